"""Somebody at a terminal who pastes blocks into Python's prompt."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[>=])")
_PASTES = ("\x1b[?2004h", "\x1b[?2004l")  # what a program says that wants to know where a paste begins and ends
_SECONDS = 50


class Terminal:
    """A prompt that believes it talks to a person.

    Args:
        argv: the command that shows the prompt.
        cwd: the folder it runs in.
        env: its environment.
    """

    def __init__(self, argv, cwd, env):
        self._screen, inside = pty.openpty()
        self._process = subprocess.Popen(
            argv, cwd=cwd, env=env | {"TERM": "xterm-256color"}, stdin=inside, stdout=inside, stderr=inside,
            start_new_session=True,
        )  # fmt: skip
        os.close(inside)
        self._shown = ""
        self._until_prompt()

    def paste(self, block):
        """Paste a block, press Enter, and once more where the prompt still says ``...``."""
        on, off = (self._shown.rfind(mark) for mark in _PASTES)
        self._press(f"\x1b[200~{block}\x1b[201~\n" if on > off else f"{block}\n")
        while self._until_prompt() == "...":
            self._press("\n")

    def leave(self):
        """Say ``exit()``; return everything that was shown."""
        self._press("exit()\n")
        self._process.wait(_SECONDS)
        while self._read(0.2):
            pass
        os.close(self._screen)
        return _ESCAPES.sub("", self._shown).replace("\r", "")

    def _press(self, keys):
        os.write(self._screen, keys.encode())

    def _until_prompt(self):
        """Return the prompt that is shown when nothing more comes for a moment."""
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            if self._read(0.5):
                continue
            found = re.search(r"(>>>|\.\.\.)\s*$", _ESCAPES.sub("", self._shown))
            if found:
                return found[1]
        raise TimeoutError(f"no prompt came: {self._shown[-500:]!r}")

    def _read(self, seconds):
        """Take what is shown within a time; say whether there was something."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # Linux says so at the end
            return False
        self._shown += data.decode()
        return bool(data)
