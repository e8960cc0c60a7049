"""Somebody who follows a page literally: an empty folder, the page's own files, commands and prompt, and what it says comes out."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

from tests.docs.terminal import Terminal

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.\w+)\n")
BASH = shutil.which("bash")
SECONDS = 50  # for a command
PORT = "8000"  # on the page; a test takes a free one
VENV = ("python3 -m venv .venv", ". .venv/bin/activate")  # the reader stands in one already


class Reader:
    """Does what a page says, block after block.

    Args:
        folder: an empty one.
        stack: closed at the end; it stops what was started.
        programs: the `bin` folder of the environment in which the reader stands.
        environment: variables to set for all commands.
    """

    def __init__(self, folder, stack, programs, environment):
        self.folder, self.stack = folder, stack
        self.output, self.promised, self.prompt = "", [], None
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = str(server.getsockname()[1])
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}
        self.environment = {**kept, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}

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
        output, _ = process.communicate(timeout=SECONDS)
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
        raise AssertionError("the server did not answer")

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
