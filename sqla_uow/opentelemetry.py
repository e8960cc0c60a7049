"""Traces and metrics of units of work for OpenTelemetry; ``pip install sqla-uow[opentelemetry]``.

::

    telemetry = OpenTelemetryObserver()
    manager = UnitOfWorkManager(engine, observers=[telemetry])
    telemetry.measure(manager)

Statements are left to `opentelemetry-instrumentation-sqlalchemy`; their spans are children of the attempt's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqla_uow._otel.metrics import Metrics
from sqla_uow._otel.spans import Spans
from sqla_uow.events import AttemptEvent, Observer, OutcomeEvent, RetryEvent

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from sqla_uow._api.manager import UnitOfWorkManager

__all__ = ["OpenTelemetryObserver"]


class OpenTelemetryObserver(Observer):
    """Makes spans and metrics of what it is told; one may serve several managers.

    A call is a span, with one below it for each attempt, which is current in the body, and below that one for COMMIT.

    Args:
        tracer_provider: None is the global one.
        meter_provider: None is the global one.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._spans = Spans(tracer_provider)
        self._metrics = Metrics(meter_provider)

    def measure(self, manager: UnitOfWorkManager[Any], /) -> None:
        """Report the turns, open attempts and pool of a manager as gauges, for as long as it lives.

        Args:
            manager: with or without this observer.
        """
        self._metrics.measure(manager)

    def on_attempt(self, event: AttemptEvent, /) -> None:
        """Begin the span of the attempt, and before the first that of the call.

        Args:
            event: which run, of what.
        """
        self._metrics.attempt(event)
        self._spans.attempt(event)

    def on_retry(self, event: RetryEvent, /) -> None:
        """End the span of the attempt.

        Args:
            event: why, and how long the wait is.
        """
        self._metrics.retry(event)
        self._spans.retry(event)

    def on_outcome(self, event: OutcomeEvent, /) -> None:
        """End the spans of the attempt and of the call.

        Args:
            event: what became of it.
        """
        self._metrics.outcome(event)
        self._spans.outcome(event)
