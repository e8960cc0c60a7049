"""What the throwaway databases have in common: their URLs, their data and their own client."""

import abc
import os
import secrets
import subprocess
from pathlib import Path
from typing import ClassVar

from . import machine
from .keeper import ENVIRONMENT, Account, Keeper
from .server import START_TIMEOUT, Argv, Server, ServerError

USER_PASSWORD = "secret"  # noqa: S105  -- of servers on the loopback that live for a test run


class DatabaseServer(Server):
    """A server that is asked in SQL."""

    drivers: ClassVar[tuple[str, ...]]
    """The asynchronous drivers that speak to it; `url` takes one of them."""
    database: ClassVar[str]
    """The database that is always there."""

    _dialect: ClassVar[str]
    _user: ClassVar[str]
    _accounts: ClassVar[tuple[str, ...]]

    # ---- what each server knows

    @abc.abstractmethod
    def _initialise(self, data: Path) -> Argv:
        """Return the command that makes a folder of data."""

    @abc.abstractmethod
    def _client(self, database: str) -> Argv:
        """Return the command that runs the SQL on its stdin, stops at the first error, and prints bare rows."""

    @abc.abstractmethod
    def drop_database(self, name: str) -> None:
        """Drop a database, ending the connections that use it."""

    # ---- use

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

    def _answers(self) -> bool:
        return not self._ask("SELECT 1", self.database).returncode

    def _ask(self, sql: str, database: str) -> subprocess.CompletedProcess[str]:
        argv = self._client(database)
        return subprocess.run(
            argv, input=sql, capture_output=True, check=False, text=True, env=ENVIRONMENT, timeout=START_TIMEOUT
        )
