"""How long to wait between two attempts, and whether calls take turns."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqla_uow._retry.predicates import check_sync

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Full-jitter backoff: before retry *n* (from 0) wait ``uniform(0, min(cap, base * 2**n))`` seconds.

    Full jitter spreads competitors best (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).  With
    the defaults the first wait is 5 ms on average, which is a few round trips, and no wait is longer than one second.

    Args:
        base: upper bound of the first wait, in seconds.
        cap: upper bound of any wait, in seconds; clamped *before* the jitter, so that late waits stay spread out.
        contention: ``"auto"`` lets fewer calls of a function run at once while their attempts waste time on conflicts;
            ``"off"`` lets all of them run, always.
        clock: a function that returns monotonic seconds.
        sleep: an async function that waits that many seconds, and can be cancelled.
        rng: a function that returns a float between its two arguments.

    Raises:
        TypeError: `clock`, `sleep` or `rng` is not callable; or `clock` or `rng` is async.
        ValueError: a bound is negative or not a number, the cap is below the base, or `contention` is something else.
    """

    base: float = 0.01
    cap: float = 1.0
    contention: Literal["auto", "off"] = "auto"
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    rng: Callable[[float, float], float] = random.uniform

    def __post_init__(self) -> None:
        numbers = isinstance(self.base, int | float) and isinstance(self.cap, int | float)
        if not numbers or not 0 <= self.base <= self.cap < float("inf"):
            raise ValueError(
                f"RetryPolicy(base={self.base!r}, cap={self.cap!r}) cannot wait; use seconds with 0 <= base <= cap"
            )
        for name in ("clock", "sleep", "rng"):
            if not callable(value := getattr(self, name)):
                raise TypeError(f"RetryPolicy({name}={value!r}) cannot be called; pass a function")
            if name != "sleep":
                check_sync(value, f"RetryPolicy({name}=...)")
        if self.contention not in ("auto", "off"):
            raise ValueError(
                f"RetryPolicy(contention={self.contention!r}) is unknown; use 'auto' to let calls take turns under conflicts, "
                "or 'off'"
            )

    def delay(self, retry: int) -> float:
        """Return how long to wait before a retry.

        Args:
            retry: the number of the retry, from 0.

        Returns:
            Seconds.
        """
        # 2.0**1024 overflows; by then the cap has long decided.
        return self.rng(0.0, min(self.cap, self.base * 2.0 ** min(retry, 1000)))
