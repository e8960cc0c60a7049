"""A supervising process that owns a folder and everything that runs in it.

A test run killed with SIGKILL runs no atexit. Asking the kernel to end the server together with its parent
(PR_SET_PDEATHSIG) is no way out: it needs preexec_fn, which is unsafe beside threads, and never reaches PostgreSQL's
backends, which live in sessions of their own. So one small process stands between the tests and a server. It is told
what to run over a pipe; when the pipe closes, for whatever reason, it kills its descendants and removes the folder.
Being a subreaper, it inherits the orphans of a killed server: they cannot be missed, and leave no zombies.

This file is both ends: `Keeper` is imported by the tests, `main` runs in the process.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

Account = tuple[int, int]  # user and group id
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_TICK = 0.005  # s, between two looks at a process
# The server's messages are matched by tests, so they are in English; PATH is what a login as root would have.
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


LAST_LINES = 40  # mariadb-install-db closes with a page of general advice


class KeeperError(RuntimeError):
    """Say why a keeper could not do what it was asked."""


class Keeper:
    """Own a fresh temporary folder and the processes started in it, until `close` or the end of this process.

    Args:
        prefix: How the folder's name begins.
        own_mounts: Let what is mounted by its programs be seen by them alone, and be gone with them; takes root.
    """

    def __init__(self, prefix: str, *, own_mounts: bool = False) -> None:
        arguments = [sys.executable, "-I", "-S", __file__, prefix, tempfile.gettempdir()]
        if own_mounts:
            arguments = ["unshare", "--mount", *arguments]  # which becomes the program it is told to run
        # A session of its own: Ctrl-C and a CI runner that kills the process group end the tests, not their keeper.
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", start_new_session=True, text=True
        )
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, _close, self._process)
        self.folder = Path(self._answer()["folder"])

    def run(self, argv: Sequence[str | Path], *, account: Account | None = None) -> None:
        """Run a program in the folder to its end.

        Args:
            argv: The program and its arguments.
            account: User and group id to run it as; None for those of this process.

        Raises:
            KeeperError: The program does not start or exits with another status than 0.
        """
        status = self._ask("run", argv=[str(word) for word in argv], account=account)["status"]
        if status:
            raise KeeperError(f"{Path(argv[0]).name} exited with status {status}; its last words: {self.last_words()}")

    def spawn(self, argv: Sequence[str | Path], *, account: Account | None = None) -> int:
        """Start a program in the folder and return its process id; arguments as for `run`."""
        return int(self._ask("spawn", argv=[str(word) for word in argv], account=account)["pid"])

    def is_running(self, pid: int) -> bool:
        """Tell whether a spawned program has not ended yet."""
        return bool(self._ask("is_running", pid=pid)["running"])

    def end(self, pid: int, signum: signal.Signals, *, timeout: float = 20.0) -> None:
        """Signal a spawned program and wait for its end, then kill whatever it has left behind.

        Args:
            pid: What `spawn` returned.
            signum: SIGKILL kills the program together with all its children, at one blow.
            timeout: Seconds until it is killed after any other signal.
        """
        self._ask("end", pid=pid, signum=int(signum), timeout=timeout)

    def signal_all(self, signum: signal.Signals) -> None:
        """Send a signal to all that runs in the folder."""
        self._ask("signal_all", signum=int(signum))

    def last_words(self) -> str:
        """Return the last lines the programs have printed, in one, or `nothing`."""
        with contextlib.suppress(FileNotFoundError):
            lines = [line.strip() for line in (self.folder / "log").read_text(errors="replace").splitlines()]
            return " | ".join([line for line in lines if line][-LAST_LINES:]) or "nothing"
        return "nothing"

    @property
    def is_open(self) -> bool:
        """Whether questions can still be asked; an interrupted one closes the keeper."""
        return self._close.alive

    def close(self) -> None:
        """Kill what still runs, remove the folder and wait until both are done; a second call does nothing."""
        self._close()

    def _ask(self, operation: str, **arguments: object) -> dict[str, Any]:
        try:
            with self._lock:
                assert self._process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # its end is reported by _answer()
                    self._process.stdin.write(json.dumps([operation, arguments]) + "\n")
                    self._process.stdin.flush()
                answer = self._answer()
        except BaseException:
            # Interrupted between question and answer: the next answer would be taken for that of another question.
            self.close()
            raise
        if "error" in answer:
            raise KeeperError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise KeeperError("the keeper of the server has ended; see its traceback on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _close(process: subprocess.Popen[str]) -> None:
    # Not a message but the closed pipe: in a forked child, which runs this at its exit too, it ends nothing.
    with process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


# ---- the other end


class _Custody:
    """Do what the tests ask for; every public method is a question of `Keeper`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._ended: dict[int, int] = {}

    def run(self, argv: list[str], account: list[int] | None) -> dict[str, object]:
        pid = self._launch(argv, account)
        while pid not in self._ended:
            # Nobody asks again before the answer: if there is something to read, it is the end.
            if select.select([sys.stdin], [], [], _TICK)[0]:
                sys.exit()
            self._reap()
        return {"status": self._ended[pid]}

    def spawn(self, argv: list[str], account: list[int] | None) -> dict[str, object]:
        return {"pid": self._launch(argv, account)}

    def is_running(self, pid: int) -> dict[str, object]:
        self._reap()
        return {"running": pid not in self._ended}

    def end(self, pid: int, signum: int, timeout: float) -> dict[str, object]:
        deadline = time.monotonic() + timeout
        if signum != signal.SIGKILL:
            self._reap()
            if pid not in self._ended:
                os.kill(pid, signum)
            while pid not in self._ended and time.monotonic() < deadline:
                self._reap()
                time.sleep(_TICK)
        self.kill_all()
        return {}

    def signal_all(self, signum: int) -> dict[str, object]:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        return {}

    def kill_all(self) -> None:
        """Kill every descendant; again, until none has been born in between."""
        while _descendants(os.getpid()):
            self.signal_all(signal.SIGKILL)
            self._reap()
            time.sleep(_TICK)

    def _launch(self, argv: list[str], account: list[int] | None) -> int:
        user, group = account or (None, None)
        with Path(self._folder, "log").open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=ENVIRONMENT,
                user=user,
                group=group,
                extra_groups=[] if account else None,
            )
        process.returncode = 0  # _reap() waits for it together with the orphans; the object must not
        return process.pid

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._ended[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name, with any character in it) state parent ...
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found = list(children.get(root, ()))
    for pid in found:  # grows as it goes: children of children
        found += children.get(pid, ())
    return found


def _answer(answer: Mapping[str, object]) -> None:
    # Unbuffered: what a broken pipe leaves in a buffer would raise once more at the interpreter's exit.
    os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")


def _leave(_signum: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; a second one would interrupt the cleaning up
    sys.exit()


def main(prefix: str, parent_folder: str) -> None:
    """Serve the questions on stdin until it closes, then leave nothing behind."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed; linux 3.4 or newer is needed")
    signal.signal(signal.SIGTERM, _leave)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent_folder)
    custody = _Custody(folder)
    try:
        _answer({"folder": folder})
        for line in sys.stdin:
            operation, arguments = json.loads(line)
            try:
                answer = getattr(custody, operation)(**arguments)
            except OSError as error:
                answer = {"error": str(error)}
            _answer(answer)
    except BrokenPipeError:
        pass  # the tests have ended while they waited for an answer
    finally:
        custody.kill_all()
        for mounted in filter(os.path.ismount, Path(folder).iterdir()):
            subprocess.run(["umount", mounted], check=True, env=ENVIRONMENT)  # noqa: S607  # found on the PATH given
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
