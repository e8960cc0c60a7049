"""Is it alive? Processes, ports and interpreters of the tests of the servers."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]


def need(*servers):
    """Skip where a server cannot run."""
    for server in servers:
        if reason := server.unavailable():
            pytest.skip(reason)


def is_alive(pid):
    """Tell whether a process exists and is more than a zombie nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_listening(port):
    """Tell whether a connection is accepted."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def python(*arguments, ground, **environment):
    """Start an interpreter whose temporary files go to the ground; it does not outlive a failed test."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(ground), **environment}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=CHECKOUT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # as a terminal's: Ctrl-C goes to all of it
    ) as run:
        try:
            yield run
        finally:
            run.kill()
