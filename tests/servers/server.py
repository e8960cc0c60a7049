"""What the throwaway servers have in common: their life."""

import abc
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
from .keeper import Account, Keeper

START_TIMEOUT = 30.0  # s; a start takes 0.1 to 0.3 s, RabbitMQ's 4 s; a recovery after kill() about the same
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
    def _serve(self, data: Path) -> Argv:
        """Return the command that runs the server in the foreground."""

    @abc.abstractmethod
    def _fill(self, keeper: Keeper) -> None:
        """Make the folder of data."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Tell whether a client is answered."""

    @classmethod
    def _account(cls) -> Account | None:
        """Return the account to run as; None for that of this process."""
        return None

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

    def is_running(self) -> bool:
        """Tell whether the server has not ended by itself."""
        keeper, pid = self._running()
        return keeper.is_running(pid)

    # ---- inside

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

    def _launch(self, keeper: Keeper) -> None:
        pid = keeper.spawn(self._serve(keeper.folder / "data"), account=self._account())
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if not keeper.is_running(pid):
                raise ServerError(f"{self.name} ended while starting; its last words: {keeper.last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer in {START_TIMEOUT} s; its last words: {keeper.last_words()}"
                )
            time.sleep(0.01)
        self.pid = pid
