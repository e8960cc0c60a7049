"""What a server needs of the machine: an account it may run as, a port that stays its own, a place for templates."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
from functools import cache
from pathlib import Path

from .keeper import ENVIRONMENT, Account, Keeper

HOST = "127.0.0.1"
# Below the range from which Linux takes the ports of outgoing connections (32768-60999): while a server is down, its
# port could else be taken by one of them, or a client that keeps trying end up connected to itself.
_PORTS = range(20_000, 32_000)
_shared: list[Keeper] = []


def free_port() -> int:
    """Return a loopback port on which nobody listens."""
    while True:
        # Not `random`: pytest-randomly seeds it, and the workers of pytest-xdist would all draw the same ports.
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def which(program: str) -> str | None:
    """Return the path of a program of the machine; a user's PATH may lack /usr/sbin."""
    return shutil.which(program) or shutil.which(program, path=ENVIRONMENT["PATH"])


@cache
def account(*names: str) -> Account | None:
    """Choose the account a server runs as.

    Args:
        names: Accounts in the order of preference, for a process of root's; servers refuse to run as root.

    Returns:
        User and group id; None for those of this process, if it is not root's.

    Raises:
        LookupError: None of the accounts exists.
    """
    if os.geteuid():
        return None
    for name in names:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    raise LookupError(f"no account {' or '.join(map(repr, names))} to run a server as; run as another user than root")


@cache
def can_use(path: Path, who: Account | None) -> bool:
    """Tell whether an account can run a program or enter a folder, with all folders above it."""
    user, group = who or (None, None)
    argv = ["test", "-x", str(path)]
    return not subprocess.run(
        argv, check=False, user=user, group=group, extra_groups=[] if who else None, env=ENVIRONMENT, cwd="/"
    ).returncode


def shared() -> Keeper:
    """Return the keeper of what the servers of this process share: templates of data, a copy of programs."""
    if not (_shared and _shared[-1].is_open):
        keeper = Keeper("uow-shared-")
        keeper.folder.chmod(0o755)
        _shared.append(keeper)
    return _shared[-1]
