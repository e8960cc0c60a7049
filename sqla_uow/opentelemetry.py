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
    """Makes spans and metrics of what managers do; one observer may serve several managers.

    A call has a span.  Below it each attempt has one, which is current in the body.  Below that COMMIT has one.

    Args:
        tracer_provider: makes the tracer; None is the global provider.
        meter_provider: makes the meter; None is the global provider.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._spans = Spans(tracer_provider)
        self._metrics = Metrics(meter_provider)

    def measure(self, manager: UnitOfWorkManager[Any], /) -> None:
        """Report the turns, open attempts and pool of a manager as gauges, for as long as it lives.

        Args:
            manager: any manager, with or without this observer.
        """
        self._metrics.measure(manager)

    def on_attempt(self, event: AttemptEvent, /) -> None:
        """Begin the span of the attempt; before the first attempt, begin the span of the call.

        Args:
            event: the run that begins, and its call.
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
            event: how the call ended.
        """
        self._metrics.outcome(event)
        self._spans.outcome(event)
