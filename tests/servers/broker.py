"""What the throwaway brokers have in common: a folder of data, and a greeting by which they show that they are up."""

import socket
from typing import ClassVar

from . import machine
from .keeper import Keeper
from .server import Server

_PATIENCE = 5.0  # s, for the answer to a greeting


class Broker(Server):
    """A server that keeps messages; what it has confirmed to their sender outlives `kill`.

    It runs as the account of this process: brokers do not refuse root.
    """

    _scheme: ClassVar[str]
    _user: ClassVar[str] = ""
    _hello: ClassVar[bytes]
    _welcome: ClassVar[bytes]
    """What is in the answer to `_hello` of a broker that is ready."""

    def url(self, *, port: int | None = None) -> str:
        """Return the URL that clients take.

        Args:
            port: Another port, such as a proxy's.
        """
        return f"{self._scheme}://{self._user}{machine.HOST}:{port or self.port}"

    def _fill(self, keeper: Keeper) -> None:
        if self.disk:
            self.disk.mount(keeper, keeper.folder / "data", None)
        else:
            (keeper.folder / "data").mkdir()

    def _answers(self) -> bool:
        try:
            with socket.create_connection((machine.HOST, self.port), _PATIENCE) as client:
                client.sendall(self._hello)
                heard = b""
                while self._welcome not in heard:
                    if not (more := client.recv(4096)):
                        return False
                    heard += more
        except OSError:  # nobody listens yet
            return False
        return True
