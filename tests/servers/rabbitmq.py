"""RabbitMQ, from Debian's package."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from signal import SIGKILL

from . import machine
from .broker import Broker
from .keeper import ENVIRONMENT
from .server import NO_SETTINGS, Argv, ServerError

# Not the one on PATH: that is a wrapper, which goes to /var/lib/rabbitmq and takes the cookie that lies there.
_PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_NODE = "uow@localhost"
_PATIENCE = 10.0  # s


class RabbitMQ(Broker):
    """A RabbitMQ with an Erlang of its own: node, cookie and port mapper; user `guest`.

    Args:
        settings: Lines of rabbitmq.conf; they win over the ones made here.
    """

    name = "RabbitMQ"
    _scheme = "amqp"
    _user = "guest:guest@"
    _hello = b"AMQP\0\0\x09\x01"
    _welcome = b"AMQPLAIN"  # one of the ways to log in that it offers
    _stop_signal = SIGKILL  # SIGTERM takes 2.5 s, and what is confirmed is on disk

    def __init__(self, settings: Mapping[str, str] = NO_SETTINGS) -> None:
        super().__init__(settings)
        self._erlang_port = machine.free_port()
        self._mapper_port = machine.free_port()

    def until_kept(self, queue: str) -> None:
        """Wait until a durable queue would outlive `kill`: Mnesia may write it down 2 s after the declaration was answered."""
        deadline = time.monotonic() + _PATIENCE
        while not self._has_on_disk(queue):
            if time.monotonic() > deadline:
                raise ServerError(f"RabbitMQ has not written down queue {queue!r} in {_PATIENCE} s; declare it durable")
            time.sleep(0.01)

    def _has_on_disk(self, queue: str) -> bool:
        folder = self.folder / "data" / _NODE
        for file in [folder / "LATEST.LOG", *folder.glob("rabbit_durable_queue.*")]:
            with contextlib.suppress(FileNotFoundError):  # the log is turned into tables now and then
                if queue.encode() in file.read_bytes():
                    return True
        return False

    @classmethod
    def _missing(cls) -> str | None:
        if not _PROGRAM.exists():
            return f"{_PROGRAM} not found; Debian: apt-get install rabbitmq-server"
        return None

    def _serve(self, data: Path) -> Argv:
        folder = data.parent
        settings = {
            "listeners.tcp.1": f"{machine.HOST}:{self.port}",
            "log.console": "true",
            "log.file": "false",
            "disk_free_limit.absolute": "1MB",
            **self.settings,
        }
        file = folder / "settings.conf"
        file.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        environment = {
            "HOME": folder,  # of the cookie, which Erlang makes
            "ERL_EPMD_ADDRESS": machine.HOST,
            "ERL_EPMD_PORT": self._mapper_port,
            "RABBITMQ_CONF_ENV_FILE": folder / "none",
            "RABBITMQ_CONFIG_FILE": file,
            "RABBITMQ_ADVANCED_CONFIG_FILE": folder / "none.config",
            "RABBITMQ_DIST_PORT": self._erlang_port,
            "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "plugins",
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_MNESIA_BASE": data,
            "RABBITMQ_NODENAME": _NODE,  # each port mapper knows one only
            "RABBITMQ_PID_FILE": folder / "pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server instead of standing before it
            "PATH": ENVIRONMENT["PATH"],
        }
        return ["env", *(f"{name}={value}" for name, value in environment.items()), _PROGRAM]
