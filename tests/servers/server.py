"""What the throwaway servers have in common: their life, their URLs and their own client."""

import abc
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals
from types import MappingProxyType, TracebackType
from typing import ClassVar, Self

from . import machine
from .disk import SmallDisk
from .keeper import ENVIRONMENT, Account, Keeper

USER_PASSWORD = "secret"  # noqa: S105  -- of servers on the loopback that live for a test run
_START_TIMEOUT = 30.0  # s; a start takes 0.1 to 0.3 s, a recovery after kill() about the same
NO_SETTINGS: Mapping[str, str] = MappingProxyType({})

Argv = Sequence[str | Path]


class ServerError(RuntimeError):
    """Say why a server, or an SQL statement sent to it, failed."""


class Server(abc.ABC):
    """A server of its own: fresh data, a loopback port, no traces.

    It is a context manager that starts and stops. Start, stop, kill and restart as often as needed; the port is drawn
    once, when the object is made. Nothing is durable against a crash of the machine, which makes it fast.

    Args:
        settings: The server's own settings by their own names; they win over the ones made here.
        disk: Where the data are; by default the machine's own.
    """

    name: ClassVar[str]
    """The server's name, as its makers write it."""
    drivers: ClassVar[tuple[str, ...]]
    """The asynchronous drivers that speak to it; `url` takes one of them."""
    database: ClassVar[str]
    """The database that is always there."""

    _dialect: ClassVar[str]
    _user: ClassVar[str]
    _accounts: ClassVar[tuple[str, ...]]
    _stop_signal: ClassVar[Signals]

    def __init__(self, settings: Mapping[str, str] = NO_SETTINGS, *, disk: SmallDisk | None = None) -> None:
        self.settings = dict(settings)
        self.disk = disk
        self.port = machine.free_port()
        self.pid: int | None = None
        self._keeper: Keeper | None = None

    # ---- what each server knows

    @classmethod
    @abc.abstractmethod
    def _missing(cls) -> str | None:
        """Return the line that says which program is missing and where to get it."""

    @abc.abstractmethod
    def _initialise(self, data: Path) -> Argv:
        """Return the command that makes a folder of data."""

    @abc.abstractmethod
    def _serve(self, data: Path) -> Argv:
        """Return the command that runs the server in the foreground."""

    @abc.abstractmethod
    def _client(self, database: str) -> Argv:
        """Return the command that runs the SQL on its stdin, stops at the first error, and prints bare rows."""

    @abc.abstractmethod
    def drop_database(self, name: str) -> None:
        """Drop a database, ending the connections that use it."""

    # ---- life

    @classmethod
    def unavailable(cls) -> str | None:
        """Return None if the server can run here, else one line: what is missing; how to get it."""
        if sys.platform != "linux":
            return f"{cls.name} is kept through /proc, which {sys.platform} has not; run the tests on linux"
        try:
            account = cls._account()
        except LookupError as error:
            return str(error)
        folder = Path(tempfile.gettempdir())
        if not machine.can_use(folder, account):
            return f"temporary folder {str(folder)!r} cannot be entered by {cls.name}'s account; set TMPDIR to one that can"
        return cls._missing()

    def start(self) -> None:
        """Start the server on fresh data and wait until it answers.

        Raises:
            ServerError: It runs already, cannot run here, or ends while starting.
        """
        if self._keeper:
            raise ServerError(
                f"{self.name} on port {self.port} has data; use restart() to keep or stop() to remove them"
            )
        if reason := self.unavailable():
            raise ServerError(reason)
        try:
            self._keeper = Keeper(f"uow-{self.name.lower()}-", own_mounts=self.disk is not None)
            self._fill(self._keeper)
            self._launch(self._keeper)
        except BaseException:
            self._discard()
            raise

    def stop(self, *, keep_data: bool = False) -> None:
        """Stop the server the fast way it offers; a stopped one stays stopped.

        Args:
            keep_data: Leave the data for `restart`; by default they are removed.
        """
        if self._keeper and self._keeper.is_open and self.pid:
            self._keeper.end(self.pid, self._stop_signal)
        self.pid = None
        if not keep_data:
            self._discard()

    def kill(self) -> None:
        """Kill the server and every process of it with SIGKILL; the data stay for `restart`."""
        keeper, pid = self._running()
        keeper.end(pid, Signals.SIGKILL)
        self.pid = None

    def freeze(self) -> None:
        """Stop every process of the server where it is, until `thaw`; the machine still accepts connections for it."""
        self._running()[0].signal_all(Signals.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._running()[0].signal_all(Signals.SIGCONT)

    def restart(self) -> None:
        """Start again on the same port and data, after `kill`, `stop(keep_data=True)`, or while running.

        Raises:
            ServerError: There are no data, or the server ends while starting.
        """
        self.stop(keep_data=True)
        if self._keeper is None:
            raise ServerError(
                f"{self.name} has no data; start() it, and stop(keep_data=True) or kill() before restart()"
            )
        try:
            self._launch(self._keeper)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # ---- use

    @property
    def folder(self) -> Path:
        """The folder of the server's data and log."""
        return self._kept().folder

    def url(self, driver: str, *, port: int | None = None, database: str | None = None) -> str:
        """Return an SQLAlchemy URL.

        Args:
            driver: One of `drivers`.
            port: Another port, such as a proxy's.
            database: Another database than the one that is always there.
        """
        if driver not in self.drivers:
            raise ValueError(
                f"driver {driver!r} does not speak to {self.name}; use {' or '.join(map(repr, self.drivers))}"
            )
        place = f"{machine.HOST}:{port or self.port}/{database or self.database}"
        return f"{self._dialect}+{driver}://{self._user}:{USER_PASSWORD}@{place}"

    def is_running(self) -> bool:
        """Tell whether the server has not ended by itself."""
        keeper, pid = self._running()
        return keeper.is_running(pid)

    def execute(self, sql: str, *, database: str | None = None) -> str:
        """Run SQL through the server's own client, each statement in a transaction of its own.

        Args:
            sql: One or more statements, parted by semicolons.
            database: Where to run them; by default the one that is always there.

        Returns:
            The rows, a line each, columns parted by tabs, without the last newline.

        Raises:
            ServerError: The server is not running or refuses a statement.
        """
        self._running()
        done = self._ask(sql, database or self.database)
        if done.returncode:
            # MariaDB's client shows the statement before the error.
            words = done.stderr[max(0, done.stderr.find("ERROR")) :].split()
            raise ServerError(f"{self.name} refused {sql!r}; {' '.join(words)}")
        return done.stdout.removesuffix("\n")

    def create_database(self) -> str:
        """Create an empty database and return its name, which no other has."""
        name = f"uow_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    # ---- inside

    @classmethod
    def _account(cls) -> Account | None:
        return machine.account(*cls._accounts)

    def _kept(self) -> Keeper:
        if self._keeper is None:
            raise ServerError(f"{self.name} has no data; start() it first")
        return self._keeper

    def _running(self) -> tuple[Keeper, int]:
        keeper = self._kept()
        if self.pid is None:
            raise ServerError(f"{self.name} on port {self.port} is not running; restart() it first")
        return keeper, self.pid

    def _discard(self) -> None:
        keeper, self._keeper, self.pid = self._keeper, None, None
        if keeper:
            keeper.close()

    def _fill(self, keeper: Keeper) -> None:
        template = self._template()
        if account := self._account():
            os.chown(keeper.folder, *account)
        if self.disk:
            self.disk.mount(keeper, keeper.folder / "data", self._account())
        keeper.run(["cp", "-a", f"{template}/.", keeper.folder / "data"], account=self._account())

    def _template(self) -> Path:
        """Make data once a process; copying them takes a tenth of the time."""
        shared = machine.shared()
        folder = shared.folder / self.name
        if not folder.exists():
            folder.mkdir(mode=0o700)
            if account := self._account():
                os.chown(folder, *account)
        template = folder / "data"
        if not template.exists():
            unfinished = folder / secrets.token_hex(4)
            shared.run(self._initialise(unfinished), account=self._account())
            unfinished.rename(template)
        return template

    def _launch(self, keeper: Keeper) -> None:
        pid = keeper.spawn(self._serve(keeper.folder / "data"), account=self._account())
        deadline = time.monotonic() + _START_TIMEOUT
        while self._ask("SELECT 1", self.database).returncode:
            if not keeper.is_running(pid):
                raise ServerError(f"{self.name} ended while starting; its last words: {keeper.last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer in {_START_TIMEOUT} s; its last words: {keeper.last_words()}"
                )
            time.sleep(0.01)
        self.pid = pid

    def _ask(self, sql: str, database: str) -> subprocess.CompletedProcess[str]:
        argv = self._client(database)
        return subprocess.run(
            argv, input=sql, capture_output=True, check=False, text=True, env=ENVIRONMENT, timeout=_START_TIMEOUT
        )
