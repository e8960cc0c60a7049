"""What has happened to the calls of one manager, in plain numbers."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from types import CodeType, MappingProxyType
from typing import TYPE_CHECKING, Any

from sqla_uow.errors import TransactionTimeoutError
from sqla_uow.typing import PoolState, Statistics, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.pool import Pool

    from sqla_uow._databases.failures import Failure
    from sqla_uow.typing import Contention

__all__ = ["Counts", "name_of", "state_of_pool"]


class Counts:
    """Plain ints that any thread may raise by one: CPython switches threads at calls and jumps only, so ``+= 1`` is whole.

    The usual unit raises two of them; a lock would cost it a quarter of a microsecond each time.
    """

    __slots__ = (
        "_lock", "ambiguous", "begun", "committed", "doomed", "gave_up", "readings", "reruns", "retries", "rolled_back",
        "timed_out",
    )  # fmt: skip

    def __init__(self) -> None:
        self.begun: int = 0
        self.reruns: int = 0
        self.readings: int = 0
        self.committed: int = 0
        self.rolled_back: int = 0
        self.ambiguous: int = 0
        self.gave_up: int = 0
        self.doomed: int = 0
        self.timed_out: int = 0
        self.retries: Counter[tuple[str, str | None]] = Counter()
        self._lock = Lock()  # of `retries`

    def retried(self, failure: Failure) -> None:
        """Count a run after which there is another."""
        with self._lock:
            self.retries[failure.kind.value, failure.code] += 1

    def failed(self, status: Status, error: BaseException | None, *, gave_up: bool, doomed: bool) -> None:
        """Count a call that has ended without a commit."""
        if status is Status.AMBIGUOUS:
            self.ambiguous += 1
            return
        self.rolled_back += 1
        if gave_up:
            self.gave_up += 1
        if doomed:
            self.doomed += 1
        if isinstance(error, TransactionTimeoutError):
            self.timed_out += 1

    def snapshot(self, pool: Pool, limit: int | None, contention: Iterable[tuple[str, Contention]]) -> Statistics:
        """Return the numbers as they are now."""
        with self._lock:
            retries = dict(self.retries)
        committed, rolled_back, ambiguous = self.committed, self.rolled_back, self.ambiguous
        attempts = self.begun + self.reruns
        return Statistics(
            begun=self.begun, committed=committed, rolled_back=rolled_back, ambiguous=ambiguous,
            gave_up=self.gave_up, doomed=self.doomed, timed_out=self.timed_out, attempts=attempts,
            open=attempts - committed - rolled_back - ambiguous - sum(retries.values()),
            retries=MappingProxyType(retries), readings=self.readings,
            pool=state_of_pool(pool, limit), contention=tuple(contention),
        )  # fmt: skip


def state_of_pool(pool: Any, limit: int | None) -> PoolState:
    """Return what a pool knows of itself; `QueuePool` knows all."""
    numbers: list[int | None] = [
        getattr(pool, name)() if hasattr(pool, name) else None
        for name in ("size", "checkedout", "overflow", "checkedin")
    ]
    size, lent, overflow, idle = numbers
    return PoolState(size, lent, None if overflow is None else max(0, overflow), limit, idle)


def name_of(function: object) -> str:
    """Return what the log calls a function whose calls take turns, or the one around a loop of attempts."""
    if isinstance(function, CodeType):
        return f"{function.co_qualname.rpartition('<locals>.')[2]}()"
    return str(getattr(function, "who", function))
