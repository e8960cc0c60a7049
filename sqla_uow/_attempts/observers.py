"""Telling observers; nothing here is called if there are none."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sqla_uow._log import log
from sqla_uow._transaction.times import Idle
from sqla_uow.events import AttemptEvent, IdleEvent, Observer, OutcomeEvent, RetryEvent
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqla_uow._attempts.call import Call
    from sqla_uow._databases.failures import Failure

__all__ = ["check_observers", "idle_of", "tell_attempt", "tell_outcome", "tell_retry"]


def idle_of(call: Call[Any]) -> Idle | None:
    """Return what watches the next run for slow calls; None if no observer wants to know."""
    wanting = [observer for observer in call.observers if type(observer).on_idle is not Observer.on_idle]
    if not wanting:
        return None

    def tell(idle: float) -> None:
        event = IdleEvent(**_common(call), status=Status.ACTIVE, idle=idle)
        _tell(call, "on_idle", event, [observer for observer in wanting if observer.idle_seconds <= idle])

    return Idle(call.policy.clock, min(observer.idle_seconds for observer in wanting), tell)


def check_observers(observers: Iterable[Observer], who: str) -> tuple[Observer, ...]:
    """Return the observers as a tuple.

    Raises:
        TypeError: one of them is not an `Observer`.
    """
    try:
        found = tuple(observers)
    except TypeError:
        raise TypeError(f"{who} has observers={observers!r}; pass a sequence of them") from None
    for observer in found:
        if not isinstance(observer, Observer):
            raise TypeError(
                f"{who} has the observer {observer!r}; pass an object of a subclass of sqla_uow.events.Observer"
            )
    return found


def tell_attempt(call: Call[Any]) -> None:
    """Tell that a run begins."""
    event = AttemptEvent(**_common(call), status=Status.NEW)
    _tell(call, "on_attempt", event)


def tell_retry(call: Call[Any], failure: Failure, error: BaseException, wait: float) -> None:
    """Tell that a run has failed and that there is another."""
    event = RetryEvent(
        **_common(call), **_end(call), status=Status.ROLLED_BACK, error=type(error),
        reason=failure.kind.value, code=failure.code, wait=wait,
    )  # fmt: skip
    _tell(call, "on_retry", event)


def tell_outcome(call: Call[Any], status: Status, error: BaseException | None, *, doomed: bool) -> None:
    """Tell what became of a call."""
    failure = call.given_up
    event = OutcomeEvent(
        **_common(call), **_end(call), status=status, error=None if error is None else type(error),
        gave_up=failure is not None, doomed=doomed,
        reason=None if failure is None else failure.kind.value, code=None if failure is None else failure.code,
    )  # fmt: skip
    _tell(call, "on_outcome", event)


def _common(call: Call[Any]) -> dict[str, Any]:
    setup, options = call.setup, call.options
    return {
        "call": call.key,
        "function": str(options.who),
        "manager": setup.name,
        "system": setup.database.system_name,
        "namespace": setup.database.engine.url.database,
        "attempt": call.attempt,
        "retries": call.retries,
        "isolation": call.isolation,
        "read_only": options.read_only,
        "elapsed": call.elapsed,
    }


def _end(call: Call[Any]) -> dict[str, Any]:
    times = call.times
    if times is None:
        return {"connection_seconds": None, "commit_at": None, "commit_seconds": None}
    return {
        "connection_seconds": times.connection_seconds,
        "commit_at": None if times.commit_began is None else times.commit_began - call.started,
        "commit_seconds": times.commit_seconds(),
    }


def _tell(call: Call[Any], method: str, event: object, observers: Iterable[Observer] | None = None) -> None:
    """Call the named observers, or all; what they raise is logged and changes nothing, unless it ends the program."""
    for observer in call.observers if observers is None else observers:
        try:
            getattr(observer, method)(event)
        except (Exception, asyncio.CancelledError) as error:
            log(
                logging.ERROR, "an observer of manager %r failed in %s; the transaction is not changed by it",
                call.setup.name, method, exc_info=error,
                function=call.options.who, manager=call.setup.name, error=error,
            )  # fmt: skip
