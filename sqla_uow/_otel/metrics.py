"""Metrics of calls, and gauges of what a manager knows of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from opentelemetry import metrics
from opentelemetry.metrics import Observation

from sqla_uow._otel.spans import SCHEMA, error_of, of_commit
from sqla_uow.typing import Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.metrics import CallbackOptions, MeterProvider

    from sqla_uow._api.manager import UnitOfWorkManager
    from sqla_uow.events import AttemptEvent, EndEvent, Event, OutcomeEvent, RetryEvent
    from sqla_uow.typing import Statistics

__all__ = ["Metrics"]

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
"""Bounds of the buckets; those that the semantic conventions advise for databases."""

Seen = tuple[float, dict[str, str]]
Create = Callable[..., object]


class Metrics:
    """The instruments; the table in the docs has their names and units.

    Args:
        provider: None is the global one.
    """

    def __init__(self, provider: MeterProvider | None) -> None:
        meter = self._meter = metrics.get_meter("sqla_uow", meter_provider=provider, schema_url=SCHEMA)
        self._attempts = meter.create_counter(
            "sqla_uow.attempts", "{attempt}", "Runs of a body, first ones and retries"
        )
        self._conflicts = meter.create_counter("sqla_uow.conflicts", "{attempt}", "Runs that a retryable failure ended")
        self._give_ups = meter.create_counter("sqla_uow.give_ups", "{call}", "Calls whose failure outlived the retries")
        self._ambiguous = meter.create_counter("sqla_uow.ambiguous_commits", "{call}", "COMMITs whose answer was lost")
        self._durations = self._histogram("sqla_uow.call.duration", "Calls, with all attempts, waits and hooks")
        self._commits = self._histogram("db.client.operation.duration", "COMMITs")
        self._waits = self._histogram("db.client.connection.wait_time", "Until an attempt had its connection")
        self._managers: WeakSet[UnitOfWorkManager[Any]] = WeakSet()
        gauge, sum_ = meter.create_observable_gauge, meter.create_observable_up_down_counter
        self._observe(gauge, "sqla_uow.contention.width", "{call}", "Calls of a group that may run at once", _widths)
        self._observe(gauge, "sqla_uow.contention.running", "{call}", "Calls of a group that run", _running)
        self._observe(gauge, "sqla_uow.contention.waiting", "{call}", "Calls of a group that await a turn", _waiting)
        self._observe(gauge, "sqla_uow.open", "{attempt}", "Attempts that run, or wait", _open)
        self._observe(sum_, "db.client.connection.count", "{connection}", "Connections, lent or not", _connections)
        self._observe(sum_, "db.client.connection.max", "{connection}", "Connections that can be lent at once", _limit)

    def _histogram(self, name: str, description: str) -> metrics.Histogram:
        return self._meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=SECONDS)

    def _observe(
        self, create: Create, name: str, unit: str, description: str, read: Callable[[Statistics], Iterable[Seen]]
    ) -> None:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for manager in list(self._managers):
                for value, attributes in read(manager.statistics()):
                    pool = {"db.client.connection.pool.name": manager.name} if name.startswith("db.") else {}
                    own = {} if pool else {"sqla_uow.manager": manager.name}
                    yield Observation(value, {**attributes, **pool, **own})

        create(name, [observe], unit, description)

    def measure(self, manager: UnitOfWorkManager[Any]) -> None:
        """Report its gauges."""
        self._managers.add(manager)

    def attempt(self, event: AttemptEvent) -> None:
        """Count a run."""
        attributes = _attributes(event)
        del attributes["db.system.name"]  # MariaDB is not known as such before its first connection
        self._attempts.add(1, attributes)

    def retry(self, event: RetryEvent) -> None:
        """Count a conflict."""
        self._conflicts.add(1, {**_attributes(event), **_why(event.reason, event.code)})
        self._end(event)

    def outcome(self, event: OutcomeEvent) -> None:
        """Count what became of a call."""
        attributes = _attributes(event)
        if event.reason is not None:
            why = {**attributes, **_why(event.reason, event.code)}
            self._conflicts.add(1, why)
            self._give_ups.add(1, why)
        if event.status is Status.AMBIGUOUS:
            self._ambiguous.add(1, attributes)
        attributes["sqla_uow.status"] = event.status.value
        self._durations.record(event.elapsed, attributes | error_of(event))
        self._end(event)

    def _end(self, event: EndEvent) -> None:
        if event.connection_seconds is not None:
            self._waits.record(event.connection_seconds, {"db.client.connection.pool.name": event.manager})
        if event.commit_seconds is not None:
            self._commits.record(event.commit_seconds, {**_attributes(event), **of_commit(event)})


def _attributes(event: Event) -> dict[str, str]:
    return {
        "sqla_uow.function": event.function, "sqla_uow.manager": event.manager, "db.system.name": event.system,
    }  # fmt: skip


def _why(reason: str, code: str | None) -> dict[str, str]:
    return {"sqla_uow.reason": reason} | ({} if code is None else {"db.response.status_code": code})


def _widths(seen: Statistics) -> Iterable[Seen]:
    return [(state.width, {"sqla_uow.function": name}) for name, state in seen.contention if state.width is not None]


def _running(seen: Statistics) -> Iterable[Seen]:
    return [(state.running, {"sqla_uow.function": name}) for name, state in seen.contention]


def _waiting(seen: Statistics) -> Iterable[Seen]:
    return [(state.waiting, {"sqla_uow.function": name}) for name, state in seen.contention]


def _open(seen: Statistics) -> Iterable[Seen]:
    return [(seen.open, {})]


def _connections(seen: Statistics) -> Iterable[Seen]:
    pool = seen.pool
    numbers = (("used", pool.checked_out), ("idle", pool.idle))
    return [(number, {"db.client.connection.state": state}) for state, number in numbers if number is not None]


def _limit(seen: Statistics) -> Iterable[Seen]:
    return [] if seen.pool.limit is None else [(seen.pool.limit, {})]
