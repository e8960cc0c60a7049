"""Spans of calls, attempts and COMMITs."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.trace import SpanKind, StatusCode

from sqla_uow.typing import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from sqla_uow.events import AttemptEvent, Call, EndEvent, Event, OutcomeEvent, RetryEvent

__all__ = ["SCHEMA", "Spans", "error_of", "of_commit"]

SCHEMA = "https://opentelemetry.io/schemas/1.43.0"
"""The semantic conventions whose names are used."""
_NANOSECONDS = 1_000_000_000


class _Open:
    """The spans of one call that are open."""

    __slots__ = ("around", "attempt", "call", "dropped")

    def __init__(self, tracer: Tracer, event: Event) -> None:
        self.call: Span = tracer.start_span(
            event.function, start_time=_at(0.0, event, time.time_ns()), attributes=_described(event)
        )
        # A loop that is left between two attempts has no outcome; its span ends with the last of it.
        self.dropped: weakref.finalize[[], Call] = weakref.finalize(event.call, self.call.end)
        self.dropped.atexit = False
        self.attempt: Span | None = None
        self.around: Context | None = None


class Spans:
    """The spans of all calls; one is found by its `Call`.

    Args:
        provider: None is the global one.
    """

    def __init__(self, provider: TracerProvider | None) -> None:
        self._tracer = trace.get_tracer("sqla_uow", tracer_provider=provider, schema_url=SCHEMA)
        self._open: weakref.WeakKeyDictionary[Call, _Open] = weakref.WeakKeyDictionary()

    def attempt(self, event: AttemptEvent) -> None:
        """Begin the span of an attempt and make it current."""
        call = self._of(event)
        call.attempt = self._tracer.start_span(
            "attempt",
            trace.set_span_in_context(call.call),
            attributes={"sqla_uow.attempt": event.attempt},
        )
        call.around = context.get_current()
        context.attach(trace.set_span_in_context(call.attempt))

    def retry(self, event: RetryEvent) -> None:
        """End the span of an attempt that is run again."""
        call = self._of(event)
        facts: dict[str, str | float] = {
            "sqla_uow.reason": event.reason,
            "sqla_uow.wait": event.wait,
            **_code_of(event),
        }
        self._end_attempt(call, event, facts, time.time_ns())

    def outcome(self, event: OutcomeEvent) -> None:
        """End the spans of a call."""
        call, now = self._of(event), time.time_ns()
        self._end_attempt(call, event, {}, now)
        facts: dict[str, str | int] = {
            **_of_database(event), "sqla_uow.attempts": event.attempt, "sqla_uow.status": event.status.value,
            **_code_of(event),
        }  # fmt: skip
        if event.reason is not None:
            facts["sqla_uow.reason"] = event.reason
        call.dropped.detach()
        call.call.update_name(event.function)  # a request has found its route meanwhile
        _end(call.call, event, facts, now)
        self._open.pop(event.call, None)

    def _of(self, event: Event) -> _Open:
        call = self._open.get(event.call)
        if call is None:
            call = self._open[event.call] = _Open(self._tracer, event)
        return call

    def _end_attempt(self, call: _Open, event: EndEvent, facts: Mapping[str, str | float], now: int) -> None:
        span, around = call.attempt, call.around
        if span is None or around is None:
            return
        call.attempt = call.around = None
        if event.commit_at is not None:
            self._commit(span, event, event.commit_at, now)
        _end(span, event, {"sqla_uow.status": event.status.value, **facts}, now)
        # Not by the token of attach(): a unit may end in another task, which has a copy of the context.
        if trace.get_current_span() is span:
            context.attach(around)

    def _commit(self, attempt: Span, event: EndEvent, began: float, now: int) -> None:
        """Make the span of a COMMIT, which is over by now."""
        span = self._tracer.start_span(
            "COMMIT" if event.namespace is None else f"COMMIT {event.namespace}",
            trace.set_span_in_context(attempt),
            SpanKind.CLIENT,
            start_time=_at(began, event, now),
            attributes={**of_commit(event), "sqla_uow.status": event.status.value},
        )
        ended = _at(began + (event.commit_seconds or 0.0), event, now)
        if event.status is Status.COMMITTED:  # what its hooks raised is none of its own
            span.end(ended)
        else:
            _end(span, event, {}, ended)


def _at(seconds: float, event: Event, now: int) -> int:
    """Return when it was so long after the call's begin; counted back from now, so that no span outlives what is around."""
    return now - round((event.elapsed - seconds) * _NANOSECONDS)


def _of_database(event: Event) -> dict[str, str]:
    """Return what the semantic conventions for databases call it."""
    found = {"db.system.name": event.system}
    if event.namespace is not None:
        found["db.namespace"] = event.namespace
    return found


def _code_of(event: EndEvent) -> dict[str, str]:
    """Return the driver's code, if there is one."""
    code = getattr(event, "code", None)
    return {} if code is None else {"db.response.status_code": code}


def of_commit(event: EndEvent) -> dict[str, str]:
    """Return what the semantic conventions say of a database operation, of COMMIT."""
    found = {**_of_database(event), "db.operation.name": "COMMIT"}
    return found if event.status is Status.COMMITTED else {**found, **_code_of(event), **error_of(event)}


def _described(event: Event) -> dict[str, str | bool | int]:
    found: dict[str, str | bool | int] = {
        **_of_database(event), "sqla_uow.manager": event.manager, "sqla_uow.retries": event.retries,
        "sqla_uow.read_only": event.read_only,
    }  # fmt: skip
    if event.isolation is not None:
        found["sqla_uow.isolation"] = event.isolation
    return found


def _end(span: Span, event: EndEvent, facts: Mapping[str, str | float], ended: int) -> None:
    """End a span; an error is told by its class, as its text may hold SQL and parameters."""
    span.set_attributes(facts)
    if event.error is not None:
        name = _name_of(event.error)
        span.set_attribute("error.type", name)
        span.add_event("exception", {"exception.type": name}, timestamp=ended)
        span.set_status(StatusCode.ERROR, event.status.value)
    span.end(ended)


def error_of(event: EndEvent) -> dict[str, str]:
    """Return the class of what it ended with, if there was an error."""
    return {} if event.error is None else {"error.type": _name_of(event.error)}


def _name_of(error: type[BaseException]) -> str:
    return error.__qualname__ if error.__module__ == "builtins" else f"{error.__module__}.{error.__qualname__}"
