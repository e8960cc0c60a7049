"""The tutorials, followed literally: an empty folder, the pages' own files, commands and prompt, and what they say comes out."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.terminal import Terminal
from tests.test_docs import CHECKOUT

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.\w+)\n")
BASH = shutil.which("bash")
PORT = "8000"  # on the page; a test takes a free one
VENV = ("python3 -m venv .venv", ". .venv/bin/activate")  # the tests' own stands for it: its packages are the page's


class Reader:
    """Does what a page says, block after block."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        self.output, self.promised, self.prompt = "", [], None
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = str(server.getsockname()[1])
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}
        # nothing may come from the network: what is installed must be enough
        self.environment = {**kept, "PATH": path, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def follow(self, page):
        """Go through a page."""
        for language, text in FENCE.findall(page.read_text()):
            {"sh": self.type_commands, "text": self.compare}.get(language, self.take_code)(text)
        self.leave_prompt()

    def take_code(self, text):
        """Save a block that begins with a file's name; paste another one into the prompt."""
        if name := FILE.match(text):
            (self.folder / name[1]).write_text(text)
        else:
            self.prompt.paste(text)

    def type_commands(self, text):
        """Run the lines of a block in a shell; a server and a prompt stay open."""
        for line in text.splitlines():
            if line in VENV:
                continue
            command = line.replace(PORT, self.port)
            if command == "python -m asyncio":
                self.prompt = Terminal([BASH, "-c", f"exec {command}"], self.folder, self.environment)
            elif "uvicorn" in command and not command.startswith("pip"):
                self.stack.enter_context(self.serving(command))
            else:
                self.output += self.finish(self.start(command, stderr=subprocess.STDOUT)) + "\n"

    def start(self, command, **streams):
        """Start a command in the folder."""
        return subprocess.Popen(
            [BASH, "-c", f"exec {command}"],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            **streams,
        )

    def finish(self, process):
        """Wait for a command that has to succeed."""
        output, _ = process.communicate(timeout=50)
        assert process.returncode == 0, output
        return output

    def leave_prompt(self):
        """End it; what a block raised would stand there."""
        if self.prompt is not None:
            shown = self.prompt.leave()
            assert not re.search(r"^(Traceback|\w*(Error|Warning)\b)", shown, re.MULTILINE), shown
            self.output += shown

    @contextmanager
    def serving(self, command):
        """Run a server until the end, as in a terminal of its own."""
        process = self.start(command, stderr=subprocess.STDOUT)
        try:
            self.wait_for_server(process)
            yield
        finally:
            process.terminate()
            self.output += process.communicate(timeout=20)[0]

    def wait_for_server(self, process):
        """Ask until somebody answers, even with an error."""
        for _ in range(200):
            assert process.poll() is None, process.stdout.read()
            try:
                urlopen(f"http://127.0.0.1:{self.port}/accounts/0", timeout=5)
            except URLError as error:
                if hasattr(error, "code"):
                    return
                time.sleep(0.05)
        pytest.fail("the server did not answer")

    def compare(self, text):
        """Remember what the page says comes out."""
        self.promised += text.splitlines()

    def check(self):
        """See that it did; a time that was measured may differ."""
        output = without_times(self.output)
        for line in self.promised:
            assert without_times(line) in output


def without_times(text):
    """Put the same figure everywhere."""
    return re.sub(r"[\d.]+ (ms|s)\b", r"0 \1", text)


@pytest.fixture
def reader(tmp_path):
    """Return somebody with an empty folder and a shell."""
    if BASH is None or shutil.which("curl") is None:
        pytest.skip("the pages' commands are for bash and curl")
    with ExitStack() as stack:
        yield Reader(tmp_path, stack)


@pytest.mark.drivers("sqlite")
def test_the_first_unit(driver, reader):
    """The page's blocks, pasted into its prompt, raise nothing, and the log tells of the retry."""
    reader.follow(CHECKOUT / "docs/tutorial.md")
    reader.check()
    assert reader.promised == [
        "INFO:sqla_uow:safe_transfer(): attempt 1 of 6 failed (conflict SQLITE_BUSY); again in 4.1 ms"
    ]
    assert "Status.COMMITTED" in reader.output


@pytest.mark.drivers("sqlite")
def test_the_web_service_and_its_tests(driver, reader):
    """The pages' files make a service that answers as they say, and tests that pass."""
    reader.follow(CHECKOUT / "docs/tutorial-web.md")
    reader.check()
    reader.follow(CHECKOUT / "docs/tutorial-testing.md")
    reader.check()
    reader.stack.close()
    assert reader.output.count("\n30 moved from 1 to 2\n") == 1
