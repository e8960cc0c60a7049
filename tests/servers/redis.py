"""Redis, from PATH."""

from pathlib import Path
from signal import SIGTERM

from . import machine
from .broker import Broker
from .server import Argv


class Redis(Broker):
    """A Redis that appends each change to a file before it answers; settings are those of its configuration file."""

    name = "Redis"
    _scheme = "redis"
    _hello = b"PING\r\nQUIT\r\n"
    _welcome = b"+PONG\r\n"  # -LOADING while it reads the file
    _stop_signal = SIGTERM

    @classmethod
    def _missing(cls) -> str | None:
        if machine.which("redis-server") is None:
            return "redis-server not found on PATH; Debian: apt-get install redis-server"
        return None

    def _serve(self, data: Path) -> Argv:
        settings = {
            "bind": machine.HOST,
            "port": str(self.port),
            "dir": str(data),
            "appendonly": "yes",
            "save": "",
            **self.settings,
        }
        program = machine.which("redis-server")
        assert program is not None
        return [program, *(word for name, value in settings.items() for word in (f"--{name}", value))]
