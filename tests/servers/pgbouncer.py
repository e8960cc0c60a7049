"""PgBouncer, from PATH, before a PostgreSQL of the tests."""

import subprocess
import time
from collections.abc import Mapping
from signal import Signals
from types import TracebackType
from typing import Self

from . import machine
from .keeper import ENVIRONMENT, Keeper
from .postgresql import PostgreSQL
from .server import NO_SETTINGS, ServerError

_START_TIMEOUT = 10.0  # s


class PgBouncer:
    """A pooler; a context manager that starts and stops it.

    Args:
        server: Where it connects to, running.
        mode: "transaction" or "session".
        size: How many connections to the server it keeps for each user and database.
        settings: Further ones by their own names.
    """

    def __init__(
        self,
        server: PostgreSQL,
        mode: str = "transaction",
        size: int = 2,
        settings: Mapping[str, str] = NO_SETTINGS,
    ) -> None:
        self.port = machine.free_port()
        self._server = server
        self._settings = {"pool_mode": mode, "default_pool_size": str(size), **settings}
        self._keeper: Keeper | None = None
        self._pid = 0

    @staticmethod
    def unavailable() -> str | None:
        """Return None if it can run here, else one line: what is missing; how to get it."""
        if machine.which("pgbouncer") is None:
            return "pgbouncer not found on PATH; Debian: apt-get install pgbouncer"
        return PostgreSQL.unavailable()

    def url(self, driver: str) -> str:
        """Return an SQLAlchemy URL through it."""
        return self._server.url(driver, port=self.port)

    def __enter__(self) -> Self:
        keeper = self._keeper = Keeper("uow-pgbouncer-")
        keeper.folder.chmod(0o755)
        users = keeper.folder / "users"
        users.write_text('"postgres" "secret"\n')
        settings = keeper.folder / "settings"
        settings.write_text(
            f"[databases]\n* = host={machine.HOST} port={self._server.port} user=postgres\n[pgbouncer]\n"
            f"listen_addr = {machine.HOST}\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"auth_file = {users}\nmax_client_conn = 100\n"
            + "".join(f"{name} = {value}\n" for name, value in self._settings.items())
        )
        self._launch(keeper)
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers():
            if time.monotonic() > deadline:
                self._keeper = None
                words = keeper.last_words()
                keeper.close()
                raise ServerError(f"PgBouncer did not answer in {_START_TIMEOUT} s; its last words: {words}")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.close()

    def restart(self) -> None:
        """Kill it with SIGKILL and start it again on the same port; does not wait until it answers."""
        assert self._keeper is not None
        self._keeper.end(self._pid, Signals.SIGKILL)
        self._launch(self._keeper)

    def _launch(self, keeper: Keeper) -> None:
        program = machine.which("pgbouncer")
        assert program is not None
        self._pid = keeper.spawn([program, keeper.folder / "settings"], account=machine.account("nobody"))

    def _answers(self) -> bool:
        psql = str(self._server._program("psql"))
        place = [f"--host={machine.HOST}", f"--port={self.port}", "--username=postgres", "--dbname=postgres"]
        argv = [psql, *place, "--no-psqlrc", "--command=SELECT 1"]
        return not subprocess.run(argv, capture_output=True, check=False, env=ENVIRONMENT).returncode
