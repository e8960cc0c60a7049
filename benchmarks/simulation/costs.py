"""What a message costs on both ends, in seconds: measured by `calibration`, used by `client`."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

__all__ = ["EXCHANGES", "ClientCosts", "Costs", "ServerCosts"]

EXCHANGES = 4
"""Messages of a transfer, each with its answer: BEGIN, two statements, COMMIT."""


@dataclass(frozen=True, kw_only=True)
class ClientCosts:
    """Seconds that a process computes for one transaction of one side, around its messages.

    Attributes:
        start: before the first message: the decorator, the session, taking a connection.
        begin: BEGIN, and a statement before the first one of the body.
        statement: a statement and its answer.
        end: COMMIT and its answer, closing, giving the connection back.
        failure: what a failed attempt computes instead of that, ROLLBACK and all.
    """

    start: float
    begin: float
    statement: float
    end: float
    failure: float


@dataclass(frozen=True, kw_only=True)
class ServerCosts:
    """Seconds that the server computes for a message."""

    begin: float
    statement: float
    commit: float
    roll_back: float
    connect: float = 0.005


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one side costs.

    Attributes:
        client: in its process.
        server: on the server.
        delay: seconds that a message is on its way, there or back.
        spread: by how much the time for the same piece of work differs, its standard deviation over its mean.  What always
            took the same would fall into step, and conflicts with it.
    """

    client: ClientCosts
    server: ServerCosts
    delay: float
    spread: float = 0.0

    def drawn(self, seconds: float, chance: random.Random) -> float:
        """Return how long it takes this time."""
        if not self.spread:
            return seconds
        variance = math.log(1 + self.spread**2)
        return seconds * chance.lognormvariate(-variance / 2, math.sqrt(variance))

    def of_client(self, times: float) -> Costs:
        """Return the same where a client computes so many times as much."""
        return replace(
            self, client=ClientCosts(**{name: seconds * times for name, seconds in asdict(self.client).items()})
        )

    @classmethod
    def mean(cls, several: list[Costs]) -> Costs:
        """Return the mean of each figure."""

        def between(kept: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                name: between([one[name] for one in kept]) if isinstance(value, dict)
                else statistics.mean(one[name] for one in kept)
                for name, value in kept[0].items()
            }  # fmt: skip

        return cls.of(between([one.as_dict() for one in several]))

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Costs:
        """Return what `as_dict` has kept."""
        return cls(
            client=ClientCosts(**kept["client"]), server=ServerCosts(**kept["server"]), delay=kept["delay"],
            spread=kept["spread"],
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return asdict(self)
