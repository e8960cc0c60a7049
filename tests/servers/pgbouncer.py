"""PgBouncer, from PATH, before a PostgreSQL of the tests."""

import shutil
import subprocess
import time
from types import TracebackType
from typing import Self

from . import machine
from .keeper import ENVIRONMENT, Keeper
from .postgresql import PostgreSQL
from .server import ServerError

_START_TIMEOUT = 10.0  # s


class PgBouncer:
    """A pooler; a context manager that starts and stops it.

    Args:
        server: Where it connects to, running.
        mode: "transaction" or "session".
        size: How many connections to the server it keeps for each user and database.
    """

    def __init__(self, server: PostgreSQL, mode: str = "transaction", size: int = 2) -> None:
        self.port = machine.free_port()
        self._server = server
        self._mode = mode
        self._size = size
        self._keeper: Keeper | None = None

    @staticmethod
    def unavailable() -> str | None:
        """Return None if it can run here, else one line: what is missing; how to get it."""
        if _program() is None:
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
            f"auth_file = {users}\npool_mode = {self._mode}\ndefault_pool_size = {self._size}\nmax_client_conn = 100\n"
        )
        program = _program()
        assert program is not None
        keeper.spawn([program, settings], account=machine.account("nobody"))
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

    def _answers(self) -> bool:
        psql = str(self._server._program("psql"))
        place = [f"--host={machine.HOST}", f"--port={self.port}", "--username=postgres", "--dbname=postgres"]
        argv = [psql, *place, "--no-psqlrc", "--command=SELECT 1"]
        return not subprocess.run(argv, capture_output=True, check=False, env=ENVIRONMENT).returncode


def _program() -> str | None:
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path=ENVIRONMENT["PATH"])
