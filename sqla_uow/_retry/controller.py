"""How many calls of a group run at once, while they get in each other's way.

Under contention most of the time goes into attempts that are aborted, and PostgreSQL looks for a deadlock only after a
second, for which everybody behind those locks waits.  With nothing in the way, one at a time would be several times too
slow.  So the width is chosen by what it brings: commits a second, measured at widths of 1, 2, 4 and so on, and looked for
again and again, for at most a tenth of the time.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from sqla_uow._log import log

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Controller"]


WIDEST = 7
"""The last rung with a limit: 2 ** 7 = 128 calls at once.  Above it nothing is held back."""
FREE = WIDEST + 1
TROUBLE = 0.2
"""Share of the time in aborted attempts from which narrower widths are tried."""
COLLAPSE = 0.5
"""Share from which the search begins with one call at a time, the only width that is sure not to stall."""
CROWDED = (0.05, 0.1)
"""Share of the time in aborted attempts while one call runs at a time, from which there must be other processes: they are
noticed above the second, and forgotten below the first."""
CROWDING = 0.8
"""What must be left of the share that is not wasted when more run at once; else it is taken from the other processes."""
NEWEST = 0.35
"""Weight of the newest epoch in such a share: the others may pause for one, and their end should be seen within 100 calls."""
CALM = 0.05
"""Share of the time in aborted attempts below which, with nobody held back, the group is not needed any more."""
CALM_SECONDS = 2.0
"""How long it must have been so."""
GAIN = 1.1
"""How much more another width must bring to be worth a change: epochs are short, and tell no smaller difference."""
MEMORY_SECONDS = 2.0
"""The time in which a measurement loses all but a third of its weight."""
SEARCH_SHARES = (0.1, 0.02)
"""How much of the throughput may be spent on tries that fail: of wider widths, so that the end of a burst is seen within a
second, and of narrower ones."""
SEARCH_SECONDS = (0.2, 10.0)
"""Bounds of the time between two tries."""
EPOCH_COMMITS = 16
SHORTEST_EPOCH = 1e-6  # s; a clock may be too coarse, or stand still in a test
EPOCH_SECONDS = 0.5
"""How long a width is measured at most before it is judged."""
TRY_PATIENCE = 1.75
"""The same for a try, in the times that the best width takes for an epoch."""
OPENING_LOCK_WAIT = 0.25
"""Seconds that an attempt waits for a lock while nothing is known: less than a deadlock would cost on PostgreSQL."""
SHORTEST_LOCK_WAIT = 0.02
"""Seconds that an attempt waits at least for a lock while the width is limited, before it makes way for the others."""
FOREIGN_LOCK_WAIT = 0.1
"""The same for locks of other processes; how long those are held is not known."""


class _Rate(NamedTuple):
    """Commits a second at one width; what is older weighs less, and is kept until something newer is known."""

    goodput: float = 0.0
    seconds: float = 0.0  # the weight of the evidence
    at: float = 0.0

    def then(self, commits: int, seconds: float, now: float) -> _Rate:
        weight = self.seconds * math.exp((self.at - now) / MEMORY_SECONDS)
        return _Rate((self.goodput * weight + commits) / (weight + seconds), weight + seconds, now)


class Controller:
    """Chooses the width by what it brings; knows no loop and no database, so that it can be simulated.

    A width is a *rung*: 2 ** rung calls at once, or `FREE`, where it begins.  Once conflicts waste a fifth of the time,
    other rungs are tried, and the one with the most commits a second is held.

    Args:
        clock: monotonic seconds.

    Attributes:
        who: the functions, for the log.
        calm: conflicts have been few for so long that nothing has to be known of them any more.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.who: str = ""
        self.width: float = math.inf
        self.calm: bool = False
        self.wasted_share: float = 0.0
        self.opening: bool = True
        self._rung = self._best = FREE
        self._downwards = False
        self._measured = [_Rate()] * (FREE + 1)
        self._contended = False
        self._lost = [0.0] * (FREE + 1)  # recent share of the time wasted at each rung
        self.crowded: bool = False
        self._typical = 0.0  # seconds of an attempt that waits for nobody
        self._idle_since: float | None = None
        self._next_try = 0.0
        self._changed_at = clock()
        self._clean_since = clock()  # nothing runs any more that a wider width had let in
        self._narrowed = False
        self._first = False  # nothing that counts has ended yet
        self._calm_since = clock()
        self._begin_epoch(clock())

    def lock_wait(self, attempt: int, running: int) -> float | None:
        """Return how long an attempt that begins now should wait for a lock, in seconds; None is for ever.

        A retry waits longer than a first run, so that attempts that wait for each other do not all give up at once.
        """
        if (running <= 1 and not self.crowded) or (self._rung == FREE and not self.opening):
            return None
        if self.opening:
            return attempt * OPENING_LOCK_WAIT
        return attempt * (FOREIGN_LOCK_WAIT if self.crowded else max(SHORTEST_LOCK_WAIT, 8 * self._typical))

    def committed(self, began: float, seconds: float, running: int, waiting: int) -> None:
        """Take note of an attempt that committed.

        Args:
            began: on the clock.
            seconds: how long it took.
            running: how many others run.
            waiting: how many wait.
        """
        # Near the shortest: what the others took includes their waits for locks.
        self._typical = min(self._typical * 1.01, seconds) if self._typical else seconds
        if self._belongs(began):
            self._useful += seconds
            self._count(1, running, waiting)

    def conflicted(self, began: float, seconds: float, running: int, waiting: int) -> None:
        """Take note of an attempt that a conflict ended; the arguments are those of `committed`."""
        if self._belongs(began):
            self._wasted += seconds
            self._contended = (
                self._contended or running > 0 or waiting > 0
            )  # an attempt that was alone is not helped by turns
            self._count(0, running, waiting)

    # -- epochs: a width is judged by what happened while it was in force

    def _begin_epoch(self, now: float) -> None:
        self._since = now
        self._done = self._ended = 0
        self._useful = self._wasted = 0.0
        self._contended = self._held_back = False
        self._peak = 0

    def _belongs(self, began: float) -> bool:
        """Say whether an attempt belongs to this epoch; after a pause, begin a new epoch with it.

        It does not if it began at the width before, or beside an attempt that did and that a narrower width would have kept
        out.  A call that waits before a retry does not run either, but such a pause is shorter.
        """
        if began < self._changed_at:
            now = self._clock()
            if self._narrowed and now - self._changed_at < EPOCH_SECONDS:
                self._clean_since = now
            return False
        if began < self._clean_since:
            return False
        if self._first or (self._idle_since is not None and began - self._idle_since > EPOCH_SECONDS):
            self._first = False
            self._begin_epoch(began)
        self._idle_since = None
        return True

    def _count(self, commits: int, running: int, waiting: int) -> None:
        self._done += commits
        self._ended += 1
        if running == 0 and waiting == 0:
            self._idle_since = self._clock()
        self._peak = max(self._peak, running + 1)
        self._held_back = self._held_back or waiting > 0
        if self._done < EPOCH_COMMITS and not self._contended:
            return
        now = self._clock()
        elapsed = max(now - self._since, SHORTEST_EPOCH)
        counted = self._ended if self.opening else self._done  # the first conflicts tell enough
        if counted >= max(EPOCH_COMMITS, 2 * self._peak) or elapsed >= self._patience():
            self.wasted_share = self._wasted / ((self._wasted + self._useful) or 1.0)
            self._judge(now, elapsed)

    def _patience(self) -> float:
        """Return the seconds after which an epoch is judged in any case."""
        if self._rung == self._best or not (known := self._measured[self._best].goodput):
            return EPOCH_SECONDS
        return min(EPOCH_SECONDS, TRY_PATIENCE * EPOCH_COMMITS / known)

    def _judge(self, now: float, elapsed: float) -> None:
        share, done, peak, held_back, contended = (
            self.wasted_share, self._done, self._peak, self._held_back, self._contended,
        )  # fmt: skip
        self._begin_epoch(now)
        self.opening = False
        self._measured[self._rung] = self._measured[self._rung].then(done, elapsed, now)
        lost = self._lost[self._rung]
        self._lost[self._rung] += NEWEST * (share - lost)
        if self.crowded and lost >= CROWDED[0] > self._lost[self._rung]:
            # The others have gone; because of them the last try was dear, and put the next one off.
            self._next_try = now
        self.crowded = self._lost[0] >= CROWDED[not self.crowded]
        if self._rung != FREE or self._lost[FREE] >= CALM:
            self._calm_since = now
        self.calm = now - self._calm_since >= CALM_SECONDS
        if self._rung != self._best:
            self._compare(now, elapsed, done, share, held_back=held_back)
        elif self._takes_from_others():
            self._hold(0)
        elif now >= self._next_try:
            self._look_around(share, peak, contended=contended)
        elif self._best > 0 and self._measured[self._best - 1].goodput > GAIN * self._measured[self._best].goodput:
            self._hold(self._best - 1)

    def _takes_from_others(self) -> bool:
        """Say whether this width wastes more than one call at a time, where there are other processes.

        What it brings here is then taken from them, and they would answer in kind.
        """
        return self.crowded and 1 - self._lost[self._rung] < (1 - self._lost[0]) * CROWDING

    # -- decisions

    def _look_around(self, share: float, peak: int, *, contended: bool) -> None:
        """Try another width than the best one known: a wider one, or in turns a narrower one while time is wasted."""
        best = self._best
        if share >= TROUBLE and contended and best > 0:
            if best == FREE or not self._downwards:
                self._downwards = True
                # All the way down where most is wasted, unless it is known what that brings.
                unknown = not self._measured[0].goodput
                self._try(0 if unknown and share >= COLLAPSE else self._below(best, peak))
                return
            self._downwards = False
        if best < FREE:
            self._downwards = False
            self._try(best + 1)

    def _compare(self, now: float, elapsed: float, done: int, share: float, *, held_back: bool) -> None:
        """Go on in the same direction while that brings more; else go back, and wait as long as the try was dear."""
        rung, best = self._rung, self._best
        brought, known = done / elapsed, self._measured[best].goodput
        worth = known * (GAIN if share >= TROUBLE or rung < best else 2 - GAIN)
        if self._takes_from_others():
            brought = 0.0
        if brought >= worth > self._measured[rung].goodput and rung > best:
            # This width did worse recently, and stalls are rare: stay until one happens or the old measurement fades.
            return
        if brought >= worth:
            going_up = rung > best
            self._best = rung
            if going_up and rung < FREE:
                self._try(rung + 1 if held_back and rung < WIDEST else FREE)
            elif not going_up and rung > 0 and share >= TROUBLE:
                self._try(rung - 1)
            else:
                self._hold(rung)
            return
        cost = (now - self._changed_at) * (1 - brought / known)
        soonest, latest = SEARCH_SECONDS
        self._next_try = now + min(latest, max(soonest, cost / SEARCH_SHARES[rung < best]))
        self._hold(best)

    def _below(self, rung: int, peak: int) -> int:
        """Return the next rung down that holds anybody back."""
        return max(0, min(rung - 1, (peak - 1).bit_length() - 1))

    def _try(self, rung: int) -> None:
        if self._rung == FREE or (self._best == 0 and rung == 0):
            log(
                logging.INFO, "%s: %.0f %% of the time went into conflicts; calls take turns",
                self.who, self.wasted_share * 100, function=self.who, width=2**rung, wasted=self.wasted_share,
            )  # fmt: skip
        self._go(rung)

    def _hold(self, rung: int) -> None:
        if rung == FREE and self._rung != FREE:
            log(
                logging.INFO, "%s: conflicts are few; no call waits for its turn any more", self.who,
                function=self.who, wasted=self.wasted_share,
            )  # fmt: skip
        self._best = rung
        self._go(rung)

    def _go(self, rung: int) -> None:
        width = math.inf if rung == FREE else 2**rung
        if width != self.width:
            self._changed_at = self._clean_since = self._clock()
            self._narrowed = width < self.width
            self._first = True
        self._rung = rung
        self.width = width
