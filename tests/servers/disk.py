"""A disk of a few megabytes for a server's data, which can be filled to the last byte and freed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .keeper import ENVIRONMENT, Account, Keeper


class SmallDisk:
    """A file system in memory, which goes with the keeper that mounts it.

    Args:
        megabytes: Its size; an empty PostgreSQL takes 40, an empty MariaDB 50.
    """

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self._keeper: Keeper | None = None
        self.folder = Path()

    @classmethod
    def unavailable(cls) -> str | None:
        """Return None if it can be mounted here, else one line: what is missing; how to get it."""
        if sys.platform == "linux" and not os.geteuid() and shutil.which("unshare"):
            argv = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
            if not subprocess.run(argv, capture_output=True, check=False, env=ENVIRONMENT).returncode:
                return None
        return "no small disk can be mounted for a server; run as root on linux, in a container as a privileged one"

    def mount(self, keeper: Keeper, folder: Path, account: Account | None) -> None:
        """Mount it, empty, as the account's folder; with `own_mounts` only the keeper and its programs see it."""
        user, group = account or (0, 0)
        keeper.run(["install", "-d", folder])
        options = f"size={self.megabytes}m,mode=700,uid={user},gid={group}"
        keeper.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])
        self._keeper, self.folder = keeper, folder

    def fill(self) -> None:
        """Take all the room there is; again, what has become free since."""
        assert self._keeper is not None
        self._keeper.run(["sh", "-c", f"cat /dev/zero >> '{self.folder}/filling' 2> /dev/null || true"])

    def free(self) -> None:
        """Give the room back."""
        assert self._keeper is not None
        self._keeper.run(["rm", "-f", self.folder / "filling"])
