"""A TCP proxy that counts round trips, and loses, delays and holds bytes on command.

It knows no protocol. It runs in a thread of its own, so a test of one event loop, of several or of none can use it;
every method may be called from any thread and has taken effect when it returns.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

from . import machine
from .link import Direction, Journal, Link, Rule
from .triggers import Action, Trigger

_PATIENCE = 20.0  # s, for the proxy's thread; it is away while a trigger's callable runs

T = TypeVar("T")


class Proxy:
    """Stand between clients and a server; a context manager, open inside the block.

    It closes a connection when either end closes its own, behind what is under way; it does not pass a half-close.

    Args:
        host: The server's.
        port: The server's; `port` of the object is the one the proxy listens on, drawn once.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = machine.free_port()
        self._upstream = (host, port)
        self._rules: dict[Direction, Rule] = {"to_server": Rule(), "to_client": Rule()}
        self._triggers: list[Trigger] = []
        self._journal = Journal()
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        # Not new_event_loop(): the policy may be uvloop's, which has other ideas of when a reset goes out.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._run, args=[self._loop], name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        try:
            self.accept()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    # ---- see

    @property
    def round_trips(self) -> int:
        """How often the server has answered a flight: bytes of a client on one connection with no answer between."""
        return self._journal.round_trips

    @property
    def flights(self) -> list[bytes]:
        """What the clients have sent, flight by flight: the first 64 KiB of each of the last 1000."""
        return self._call(lambda: [bytes(flight) for flight in self._journal.flights])

    @property
    def connections(self) -> int:
        """How many connections of clients are open."""
        return len(self._links)

    def reset_counts(self) -> None:
        """Forget round trips and flights, those under way too."""

        def reset() -> None:
            self._journal.round_trips = 0
            self._journal.flights.clear()
            for link in self._links:
                link.forget()

        self._call(reset)

    # ---- disturb

    def delay(self, direction: Direction, seconds: float) -> None:
        """Let bytes that arrive from now on wait before they pass; 0 ends it, for those that arrive then."""
        self._call(lambda: setattr(self._rules[direction], "delay", seconds))

    def hold(self, direction: Direction) -> None:
        """Keep back, in order, all bytes and the ends of connections."""
        self._call(lambda: setattr(self._rules[direction], "held", True))

    def release(self, direction: Direction) -> None:
        """End `hold` and forward what it has kept back."""

        def release() -> None:
            self._rules[direction].held = False
            for link in self._links:
                link.lanes[direction].pump()

        self._call(release)

    def drop(self, direction: Direction) -> None:
        """Swallow the bytes that arrive from now on, until `forward_all`; the end of a connection still passes."""
        self._call(lambda: setattr(self._rules[direction], "dropping", True))

    def cut(self) -> None:
        """Reset (RST) all open connections at both ends; what is under way is lost."""

        def cut() -> None:
            for link in self._links:
                link.cut()

        self._call(cut)
        self._call(lambda: None)  # the reset goes out one turn of the loop later

    def refuse(self) -> None:
        """Refuse new connections; open ones stay."""
        self._call(self._refuse)

    def accept(self) -> None:
        """Accept new connections again, on the same port."""
        self._call(self._accept)

    def forward_all(self) -> None:
        """Undo everything: forward what is held or delayed, drop nothing, disarm all triggers, accept connections."""

        def forward_all() -> None:
            self._triggers.clear()
            for rule in self._rules.values():
                rule.reset()
            for link in self._links:
                link.forward_all()
            self._accept()

        self._call(forward_all)

    def on_client_bytes(self, needle: bytes, action: Action, *, after_server: bool = False) -> Trigger:
        """Do something, once, when a client sends certain bytes.

        | action   | before the server has them (default)       | `after_server`: with its answer, before the client |
        |----------|--------------------------------------------|----------------------------------------------------|
        | "cut"    | lost before the server applied it          | lost after the server applied it                   |
        | "hold"   | not applied until `Trigger.release`        | applied, the client waits for `Trigger.release`    |
        | callable | called, then they pass                     | called, then the answer passes                     |

        What is kept back is the piece of the stream that completes the needle, with all that follows on this
        connection; the answer is the first piece that the server sends after it. Only the connection that has sent
        the needle is cut or held. Of several triggers that match, the first armed fires; the others wait for the next
        match. A callable runs in the proxy's thread, which has a running event loop of its own: it may block, as
        `Server.execute` does, and nothing passes on any connection until it returns, but it cannot use asyncio.run.

        Args:
            needle: In any case (b"commit" finds COMMIT; asyncpg sends `COMMIT;`, the others `COMMIT`). It also matches
                inside longer words, such as synchronous_commit.
            action: "cut", "hold" or a callable without arguments.
            after_server: Whether to wait for the server's answer.
        """
        if not needle:
            raise ValueError("the needle b'' is in everything; name the bytes to wait for")
        trigger = Trigger(needle, action, after_server=after_server)
        self._call(lambda: self._triggers.append(trigger))
        return trigger

    # ---- in the proxy's thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.close()

    def _accept(self) -> None:
        if self._listener is None:
            assert self._loop is not None
            self._listener = socket.create_server((machine.HOST, self.port))
            self._listener.settimeout(0)
            self._loop.add_reader(self._listener, self._welcome, self._loop, self._listener)

    def _refuse(self) -> None:
        if self._listener is not None:
            assert self._loop is not None
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _welcome(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        try:
            client, _address = listener.accept()
        except OSError:  # gone again
            return
        task = loop.create_task(self._connect(loop, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, loop: asyncio.AbstractEventLoop, client: socket.socket) -> None:
        link = Link(self._rules, self._triggers, self._journal, self._call)
        self._links.add(link)
        try:
            await loop.connect_accepted_socket(lambda: link.end("to_server"), client)
            try:
                await loop.create_connection(lambda: link.end("to_client"), *self._upstream)
            except OSError:  # the server is down, and the client is to see no better
                link.cut()
                return
            await link.ended.wait()
        finally:
            self._links.discard(link)

    async def _shutdown(self) -> None:
        self._refuse()
        await asyncio.sleep(0)  # a task cancelled before its first step would never close its socket
        for link in self._links:
            link.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- across threads

    def _call(self, function: Callable[[], T]) -> T:
        if self._loop is None or self._thread is None:
            raise RuntimeError(f"proxy on port {self.port} is not open; use it as a context manager")
        if threading.current_thread() is self._thread:  # a trigger's callable
            return function()
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(function())
            except BaseException as error:  # noqa: BLE001  -- raised where it was called
                result.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return result.result(_PATIENCE)

    def _end(self) -> None:
        assert self._loop is not None
        assert self._thread is not None
        asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result(_PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop = self._thread = None
