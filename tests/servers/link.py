"""One connection through the proxy: two lanes, each in its direction. All of it runs in the proxy's thread."""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .triggers import Trigger

Direction = Literal["to_server", "to_client"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, on, for 0 s: close() sends RST instead of FIN
_TAIL = 1024  # B of a client's stream that are searched again together with the next ones, for a needle cut in two
_FLIGHT_BYTES = 65_536  # kept of a flight
_FLIGHTS = 1000  # kept of all


@dataclass
class Rule:
    """What holds for one direction of every connection."""

    delay: float = 0.0
    held: bool = False
    dropping: bool = False

    def reset(self) -> None:
        """Forward everything at once."""
        self.delay, self.held, self.dropping = 0.0, False, False


@dataclass
class Journal:
    """What has passed, over all connections, since the last reset."""

    round_trips: int = 0
    flights: deque[bytearray] = field(default_factory=lambda: deque(maxlen=_FLIGHTS))


class Lane:
    """Bytes under way in one direction, in order, and then the end of the connection (None)."""

    def __init__(self, rule: Rule) -> None:
        self.sink: asyncio.Transport | None = None
        self.held = False
        self._rule = rule
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes | None]] = deque()

    def feed(self, data: bytes | None) -> None:
        """Take what has arrived and pass on what is due."""
        if self._rule.dropping and data is not None:
            return
        self._queue.append((self._loop.time() + self._rule.delay, data))
        self.pump()

    def pump(self) -> None:
        """Pass on what is due, unless it is held or the other end is not there yet."""
        while self._queue and self.sink and not (self.held or self._rule.held):
            due, data = self._queue[0]
            if due > self._loop.time():
                self._loop.call_at(due, self.pump)
                return
            self._queue.popleft()
            if data is None:
                self.sink.close()
            elif not self.sink.is_closing():  # as it is after a cut
                self.sink.write(data)

    def release(self) -> None:
        """End the hold of a trigger."""
        self.held = False
        self.pump()

    def flush(self) -> None:
        """End all holds and delays; the rule has to be reset before."""
        self._queue = deque((0.0, data) for _due, data in self._queue)
        self.release()


class Link:
    """A client's connection and the server's that belongs to it.

    Args:
        rules: Those of the proxy, by direction.
        triggers: Those that wait; the one that matches first is taken out.
        journal: Where to write what passes.
        call: Runs a function in the proxy's thread, from any thread.
    """

    def __init__(
        self,
        rules: dict[Direction, Rule],
        triggers: list[Trigger],
        journal: Journal,
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        self.lanes: dict[Direction, Lane] = {direction: Lane(rule) for direction, rule in rules.items()}
        self.ended = asyncio.Event()
        self._triggers = triggers
        self._journal = journal
        self._call = call
        self._flight: bytearray | None = None  # what the client has sent since the server's last answer
        self._tail = b""
        self._awaiting: Trigger | None = None
        self._is_cut = False
        self._ends_left = 2

    def end(self, direction: Direction) -> asyncio.Protocol:
        """Return the protocol that reads what goes in a direction."""
        return _End(self, direction)

    def opened(self, direction: Direction, transport: asyncio.Transport) -> None:
        """Take an end's connection, to write to it what comes from the other."""
        other: Direction = "to_client" if direction == "to_server" else "to_server"
        self.lanes[other].sink = transport
        if self._is_cut:
            _reset(transport)
        self.lanes[other].pump()

    def arrived(self, direction: Direction, data: bytes) -> None:
        """Count, obey a trigger, pass on."""
        if direction == "to_server":
            self._from_client(data)
        else:
            self._from_server(data)

    def closed(self, direction: Direction) -> None:
        """Pass the end of a connection on, behind what is under way."""
        self._ends_left -= 1
        self.lanes[direction].feed(None)
        if not self._ends_left:
            self.ended.set()

    def cut(self) -> None:
        """Reset both connections; what is under way is lost."""
        self._is_cut = True
        for lane in self.lanes.values():
            if lane.sink:
                _reset(lane.sink)

    def forget(self) -> None:
        """Count a late answer to an earlier flight no more."""
        self._flight = None

    def forward_all(self) -> None:
        """Forward what triggers and rules have kept back."""
        self._awaiting = None
        for lane in self.lanes.values():
            lane.flush()

    def _from_client(self, data: bytes) -> None:
        if self._flight is None:
            self._flight = bytearray()
            self._journal.flights.append(self._flight)
        self._flight += data[: _FLIGHT_BYTES - len(self._flight)]
        trigger = self._matching(data)
        if trigger and not trigger.after_server:
            self._obey(trigger, "to_server", data)
        else:
            self._awaiting = trigger or self._awaiting
            self.lanes["to_server"].feed(data)

    def _from_server(self, data: bytes) -> None:
        if self._flight is not None:
            self._flight = None
            self._journal.round_trips += 1
        trigger, self._awaiting = self._awaiting, None
        if trigger:
            trigger.answer = data
            self._obey(trigger, "to_client", data)
        else:
            self.lanes["to_client"].feed(data)

    def _matching(self, data: bytes) -> Trigger | None:
        seen, self._tail = self._tail, (self._tail + data.lower())[-_TAIL:]
        if self._awaiting:
            return None
        for trigger in self._triggers:
            # Not all of the tail: a needle that lies in it as a whole has passed before.
            rest = seen[max(0, len(seen) - len(trigger.needle) + 1) :]
            if trigger.needle in rest + data.lower():
                self._triggers.remove(trigger)
                return trigger
        return None

    def _obey(self, trigger: Trigger, direction: Direction, data: bytes) -> None:
        lane = self.lanes[direction]
        if trigger.action == "hold":
            lane.held = True
            trigger.held(lambda: self._call(lane.release))
        elif trigger.action == "cut" or not trigger.call():
            self.cut()
        # Before the client can see anything of it: who has seen its error finds that the trigger has fired.
        trigger.done()
        lane.feed(data)  # after a cut, to nobody


class _End(asyncio.Protocol):
    def __init__(self, link: Link, direction: Direction) -> None:
        self._link = link
        self._direction: Direction = direction

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._link.opened(self._direction, transport)

    def data_received(self, data: bytes) -> None:
        self._link.arrived(self._direction, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.closed(self._direction)


def _reset(transport: asyncio.Transport) -> None:
    with contextlib.suppress(OSError):  # closed already
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()
