"""MariaDB, from the programs on PATH."""

from collections.abc import Mapping
from pathlib import Path
from signal import SIGTERM

from . import machine
from .database import USER_PASSWORD, DatabaseServer
from .server import NO_SETTINGS, Argv

_DEFAULTS = {
    "innodb_buffer_pool_size": "32M",
    "innodb_flush_log_at_trx_commit": "2",  # 0 is no faster here, and kill() would undo the commits of the last second
    "innodb_flush_method": "nosync",
    "innodb_log_file_size": "8M",
    "performance_schema": "OFF",
}
_PROGRAMS = {"mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server", "mariadb": "mariadb-client"}


class MariaDB(DatabaseServer):
    """A MariaDB of the machine's own packages, user `u` with all privileges."""

    name = "MariaDB"
    drivers = ("asyncmy", "aiomysql")
    database = "test"
    _dialect = "mysql"
    _user = "u"
    _accounts = ("mysql", "nobody")
    _stop_signal = SIGTERM

    def drop_database(self, name: str) -> None:
        """Drop a database, ending the connections that use it."""
        users = self.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'")
        # A transaction left open keeps its tables, for lock_wait_timeout = 86400 s.
        for user in users.split():
            self._ask(f"KILL {user}", self.database)  # refused if it has left by itself
        self.execute(f"DROP DATABASE IF EXISTS `{name}`")

    @classmethod
    def _missing(cls) -> str | None:
        for name, package in _PROGRAMS.items():
            if machine.which(name) is None:
                return f"{name} not found on PATH; Debian: apt-get install {package}"
        return None

    def _initialise(self, data: Path) -> Argv:
        # A tmpdir of its own: a server that starts removes all of MariaDB's temporary tables in its tmpdir.
        folders = [f"--datadir={data}", f"--tmpdir={data.parent}"]
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        return [_program("mariadb-install-db"), "--no-defaults", *folders, *options, *_options(_DEFAULTS)]

    def _serve(self, data: Path) -> Argv:
        # One statement a line, run before the first client is let in.
        accounts = data.parent / "accounts.sql"
        accounts.write_text(
            f"CREATE DATABASE IF NOT EXISTS {self.database};\n"
            f"CREATE USER IF NOT EXISTS {self._user}@'%' IDENTIFIED BY '{USER_PASSWORD}';\n"
            f"GRANT ALL ON *.* TO {self._user}@'%' WITH GRANT OPTION;\n"
        )
        accounts.chmod(0o644)  # whatever the umask, the server's account has to read it
        settings = {
            "datadir": str(data),
            "bind_address": machine.HOST,
            "port": str(self.port),
            "socket": "socket",  # in the data; an absolute path may have 107 bytes, a temporary folder more
            "pid_file": str(data / "pid"),
            "tmpdir": str(data.parent),
            "init_file": str(accounts),
            **_DEFAULTS,
            **self.settings,
        }
        return [_program("mariadbd"), "--no-defaults", "--skip-name-resolve", *_options(settings)]

    def _client(self, database: str) -> Argv:
        place = ["--protocol=TCP", f"--host={machine.HOST}", f"--port={self.port}", f"--database={database}"]
        user = [f"--user={self._user}", f"--password={USER_PASSWORD}"]
        return [_program("mariadb"), "--no-defaults", *place, *user, "--batch", "--skip-column-names"]


class Replica(MariaDB):
    """A replica, which replays what another server writes, by GTID.

    Args:
        primary: That server, with a binary log, running at `start`.
        settings: As for every server.
    """

    def __init__(self, primary: MariaDB, settings: Mapping[str, str] = NO_SETTINGS) -> None:
        super().__init__({"server_id": "2", "read_only": "ON", **settings})
        self.primary = primary

    def start(self) -> None:
        """Start the server, and the replication from the very beginning of the primary's log."""
        super().start()
        self.execute(
            f"CHANGE MASTER TO master_host='{machine.HOST}', master_port={self.primary.port}, master_user='{self._user}', "
            f"master_password='{USER_PASSWORD}', master_use_gtid=slave_pos; START SLAVE"
        )

    def pause(self) -> None:
        """Replay nothing until `resume`; what arrives is kept."""
        self.execute("STOP SLAVE SQL_THREAD")

    def resume(self) -> None:
        """Go on replaying."""
        self.execute("START SLAVE SQL_THREAD")


def _options(settings: dict[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def _program(name: str) -> str:
    found = machine.which(name)
    assert found is not None
    return found
