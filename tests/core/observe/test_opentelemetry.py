"""Spans and metrics, as an exporter gets them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import re
import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqla_uow import (
    RetryPolicy,
    UnitOfWorkManager,
    after_commit,
    current_session,
    errors,
    transactional,
)
from sqla_uow._otel import metrics as _otel_metrics
from sqla_uow._otel import spans as _otel_spans
from sqla_uow.opentelemetry import OpenTelemetryObserver
from sqla_uow.testing import FaultPlan
from tests.kit.models import Note
from tests.kit.queueing import a_turn_that_does_not_come, narrow

SYSTEMS = {"postgresql": "postgresql", "mysql": "mariadb", "sqlite": "sqlite"}


class Telemetry:
    """An observer whose spans and metrics stay in memory."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader])
        self.observer = OpenTelemetryObserver(tracer_provider=self.tracer_provider, meter_provider=self.meter_provider)

    @property
    def spans(self):
        """What has ended, in the order of beginning."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))

    def named(self, name):
        """Return the spans of this name, or of this operation on whichever database."""
        return [span for span in self.spans if span.name == name or span.name.startswith(f"{name} ")]

    def points(self, name):
        """Return the points of an instrument, with its unit."""
        data = self.reader.get_metrics_data()
        found = [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return [(metric.unit, point) for metric in found for point in metric.data.data_points]

    def values(self, name):
        """Return the unit, the value and the attributes of each point."""
        return [(unit, point.value, dict(point.attributes)) for unit, point in self.points(name)]


@pytest.fixture
def telemetry():
    """OpenTelemetry in memory."""
    return Telemetry()


def is_below(child, parent):
    """Say whether a span is the child of the other, and lies in its time."""
    assert child.parent.span_id == parent.context.span_id
    assert child.context.trace_id == parent.context.trace_id
    return parent.start_time <= child.start_time <= child.end_time <= parent.end_time


async def test_a_call_its_attempts_and_its_commit_are_spans(db, trouble, telemetry):
    """One trace: the call below the span around it, two attempts, the second with a COMMIT; current in the body."""
    manager = UnitOfWorkManager(trouble.engine(), name="bank", observers=[telemetry.observer])
    tracer = telemetry.tracer_provider.get_tracer("test")
    current = []

    @transactional(using=manager, retries=3, isolation=trouble.isolation, retry=RetryPolicy(base=0, cap=0))
    async def write():
        await trouble.settle()
        current.append(trace.get_current_span().get_span_context())
        if len(current) == 1:
            await trouble.strike(current_session(manager))
        await trouble.write(current_session(manager))

    with tracer.start_as_current_span("request") as request:
        await write()
        assert trace.get_current_span() is request
    around, call, first, second, commit = telemetry.spans
    assert [span.name for span in telemetry.spans] == [
        "request", "write()", "attempt", "attempt", f"COMMIT {manager.engine.url.database}",
    ]  # fmt: skip
    assert is_below(call, around)
    assert is_below(first, call)
    assert is_below(second, call)
    assert is_below(commit, second)
    assert first.end_time <= second.start_time
    assert [span.context for span in (first, second)] == current
    database = {"db.system.name": SYSTEMS[db.family], "db.namespace": manager.engine.url.database}
    level = {} if trouble.isolation is None else {"sqla_uow.isolation": trouble.isolation}
    assert dict(call.attributes) == database | level | {
        "sqla_uow.manager": "bank", "sqla_uow.retries": 3, "sqla_uow.read_only": False, "sqla_uow.attempts": 2,
        "sqla_uow.status": "committed",
    }  # fmt: skip
    assert (call.status.status_code, call.events) == (StatusCode.UNSET, ())
    assert dict(second.attributes) == {"sqla_uow.attempt": 2, "sqla_uow.status": "committed"}
    assert (commit.kind, dict(commit.attributes)) == (
        SpanKind.CLIENT, database | {"db.operation.name": "COMMIT", "sqla_uow.status": "committed"},
    )  # fmt: skip
    assert first.status.status_code is StatusCode.ERROR
    assert first.attributes["sqla_uow.reason"] == trouble.reason
    assert first.attributes["db.response.status_code"] == trouble.code
    (event,) = first.events
    assert (event.name, dict(event.attributes)) == ("exception", {"exception.type": first.attributes["error.type"]})
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_a_call_that_gives_up_is_an_error(db, trouble, telemetry):
    """By the class of what it ends with, its reason and code; no text, which may hold SQL."""
    manager = UnitOfWorkManager(trouble.engine(), observers=[telemetry.observer])

    @transactional(using=manager, isolation=trouble.isolation)
    async def write():
        await trouble.strike(current_session(manager))

    with pytest.raises(errors.ConflictError):
        await write()
    call, attempt = telemetry.spans
    for span in (call, attempt):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "rolled back")
        assert span.attributes["error.type"] == "sqla_uow.errors.ConflictError"
        assert [dict(event.attributes) for event in span.events] == [
            {"exception.type": "sqla_uow.errors.ConflictError"}
        ]
    assert call.attributes["sqla_uow.reason"] == trouble.reason
    assert call.attributes["db.response.status_code"] == trouble.code
    why = {
        "sqla_uow.function": "write()", "sqla_uow.manager": "default", "db.system.name": SYSTEMS[db.family],
        "sqla_uow.reason": trouble.reason, "db.response.status_code": trouble.code,
    }  # fmt: skip
    assert telemetry.values("sqla_uow.conflicts") == [("{attempt}", 1, why)]
    assert telemetry.values("sqla_uow.give_ups") == [("{call}", 1, why)]


async def test_a_commit_that_is_refused_has_the_code(db, telemetry):
    """The semantic conventions want it, and the error's class, of the operation that failed: span and duration."""
    manager = UnitOfWorkManager(db.engine(), observers=[telemetry.observer])

    @transactional(using=manager, retries=1, retry=RetryPolicy(base=0, cap=0))
    async def write():
        current_session(manager).add(Note(text="written"))

    with FaultPlan(manager, "conflict", at="commit"):
        await write()
    refused, applied = telemetry.named("COMMIT")
    code = {"postgresql": "40001", "mysql": "1213", "sqlite": "SQLITE_BUSY"}[db.family]
    failed = {"db.response.status_code": code, "error.type": refused.attributes["error.type"]}
    assert failed.items() <= refused.attributes.items()
    assert refused.attributes["error.type"].startswith("sqlalchemy.exc.")
    assert failed.keys().isdisjoint(applied.attributes)
    points = [dict(point.attributes) for _, point in telemetry.points("db.client.operation.duration")]
    assert [failed.items() <= point.items() for point in points] == [True, False]
    assert failed.keys().isdisjoint(points[1])
    assert await db.scalar("SELECT count(*) FROM note") == 1


def test_its_names_are_those_of_the_semantic_conventions():
    """Those that are not our own, so that what everybody's tools show of databases is shown of these."""
    known = {
        value for module in (db_attributes, db_metrics) for value in vars(module).values() if isinstance(value, str)
    }
    ours = "".join(inspect.getsource(module) for module in (_otel_spans, _otel_metrics))
    names = set(re.findall(r'"(db\.[a-z_.]+\w)"', ours))
    assert len(names) > 7
    assert names <= known
    assert _otel_spans.SCHEMA in [schema.value for schema in Schemas]


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_an_unknown_commit_is_an_error_with_its_status(wire, telemetry):
    """On the COMMIT, whose span covers the time until the link broke, and on what is around it."""
    manager = UnitOfWorkManager(wire.engine, observers=[telemetry.observer])
    wire.on_commit("cut", applied=True)
    with pytest.raises(errors.AmbiguousCommitError):
        async with manager.begin() as unit:
            await unit.session.execute(text("UPDATE account SET balance = balance + 1"))
    call, attempt, commit = telemetry.spans
    assert is_below(commit, attempt)
    assert commit.end_time > commit.start_time
    for span in (call, attempt, commit):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ambiguous")
        assert span.attributes["sqla_uow.status"] == "ambiguous"
        assert span.attributes["error.type"] == "sqla_uow.errors.AmbiguousCommitError"
    assert [value for _, value, _ in telemetry.values("sqla_uow.ambiguous_commits")] == [1]
    assert await wire.balance() == 1


async def test_a_hook_that_fails_is_no_failure_of_its_commit(db, telemetry):
    """The COMMIT is sound; what is around it has the error, and a unit begun in a hook is in the same trace."""
    manager = UnitOfWorkManager(db.engine(), observers=[telemetry.observer])

    @transactional(using=manager)
    async def later():
        current_session(manager).add(Note(text="later"))
        raise ZeroDivisionError

    with manager.activate(), pytest.raises(errors.AfterCommitError):
        async with manager.begin() as unit:
            unit.session.add(Note(text="written"))
            after_commit(later)
    (commit,) = telemetry.named("COMMIT")
    (call,), (hook,) = telemetry.named("begin()"), telemetry.named("later()")
    assert (commit.status.status_code, commit.attributes["sqla_uow.status"]) == (StatusCode.UNSET, "committed")
    assert (call.status.status_code, call.attributes["sqla_uow.status"]) == (StatusCode.ERROR, "committed")
    assert hook.context.trace_id == call.context.trace_id
    assert hook.attributes["error.type"] == "ZeroDivisionError"
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_a_unit_that_ends_in_another_task_leaves_no_trace_behind(db, telemetry, caplog):
    """As a request's does, behind some middleware: no complaint about the context, and the span is ended."""
    manager = UnitOfWorkManager(db.engine(), observers=[telemetry.observer])
    block = manager.begin()
    unit = await block.__aenter__()
    unit.session.add(Note(text="written"))
    seen = []

    async def end():
        await block.__aexit__(None, None, None)
        seen.append(trace.get_current_span())

    await asyncio.create_task(end())
    assert [span.name.split()[0] for span in telemetry.spans] == ["begin()", "attempt", "COMMIT"]
    assert seen == [trace.INVALID_SPAN]
    assert caplog.records == []
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_spans_that_the_body_leaves_open_stay_current(db, telemetry):
    """What somebody else has made current is not taken away."""
    manager = UnitOfWorkManager(db.engine(), observers=[telemetry.observer])
    stack = contextlib.ExitStack()
    tracer = telemetry.tracer_provider.get_tracer("test")
    async with manager.begin():
        left_open = stack.enter_context(tracer.start_as_current_span("left open"))
    assert trace.get_current_span() is left_open
    stack.close()


async def test_a_turn_that_does_not_come_is_a_span_without_attempts(db, telemetry):
    """The deadline passes in the queue."""
    manager = UnitOfWorkManager(db.engine(), observers=[telemetry.observer])
    async with a_turn_that_does_not_come(manager):
        (call,) = telemetry.named("attempts()")
        assert call.attributes["error.type"] == "sqla_uow.errors.TransactionTimeoutError"
        assert telemetry.named("attempt") == []
    assert len(telemetry.named("attempt")) == 2


async def test_a_loop_left_between_two_attempts_ends_its_span(db, trouble, telemetry):
    """There is no outcome, and yet nothing stays open."""
    manager = UnitOfWorkManager(trouble.engine(), observers=[telemetry.observer])

    async def look():
        async for attempt in manager.attempts(retries=3, isolation=trouble.isolation):
            if len(telemetry.named("attempt")):
                break
            async with attempt as unit:
                await trouble.strike(unit.session)

    await look()
    gc.collect()  # the traceback of the conflict is a cycle
    (call,) = telemetry.named("attempts()")
    assert "sqla_uow.status" not in call.attributes
    assert len(telemetry.named("attempt")) == 1
    assert await db.scalar("SELECT count(*) FROM note") == 0


async def test_a_failure_without_a_code_and_a_database_without_a_name(telemetry):
    """Chosen by `retry_on`, in memory: what is not known is left out."""
    engine = create_async_engine("sqlite+aiosqlite://")
    manager = UnitOfWorkManager(engine, observers=[telemetry.observer])

    @transactional(using=manager, retries=1, retry_on=lambda error: isinstance(error, KeyError))
    async def write():
        await current_session(manager).execute(text("SELECT 1"))
        if not telemetry.named("attempt"):
            raise KeyError

    await write()
    await engine.dispose()
    call, first, _second, commit = telemetry.spans
    assert first.attributes["sqla_uow.reason"] == "retry_on"
    assert "db.response.status_code" not in first.attributes
    assert first.attributes["error.type"] == "KeyError"
    assert "db.namespace" not in call.attributes
    assert "db.namespace" not in commit.attributes
    assert commit.name == "COMMIT"


async def test_durations_and_attempts_are_metrics(db, telemetry):
    """In seconds, by function and outcome."""
    manager = UnitOfWorkManager(db.engine(), name="bank", observers=[telemetry.observer])

    @transactional(using=manager)
    async def write():
        current_session(manager).add(Note(text="written"))

    await write()
    await write()
    own = {"sqla_uow.function": "write()", "sqla_uow.manager": "bank"}
    assert telemetry.values("sqla_uow.attempts") == [("{attempt}", 2, own)]
    ((unit, point),) = telemetry.points("sqla_uow.call.duration")
    assert (unit, point.count) == ("s", 2)
    assert dict(point.attributes) == own | {"db.system.name": SYSTEMS[db.family], "sqla_uow.status": "committed"}
    assert 0 < point.sum < 10
    assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
    ((unit, point),) = telemetry.points("db.client.operation.duration")
    assert (unit, point.count) == ("s", 2)
    commits = {"db.namespace": manager.engine.url.database, "db.operation.name": "COMMIT"}
    assert dict(point.attributes) == own | commits | {"db.system.name": SYSTEMS[db.family]}
    ((unit, point),) = telemetry.points("db.client.connection.wait_time")
    assert (unit, point.count, dict(point.attributes)) == ("s", 2, {"db.client.connection.pool.name": "bank"})
    assert await db.scalar("SELECT count(*) FROM note") == 2


async def test_a_manager_that_is_measured_has_gauges(db, telemetry):
    """Turns by function, attempts that are open, connections that are lent; of no manager that is gone."""
    manager = UnitOfWorkManager(db.engine(pool_size=2, max_overflow=1), name="bank", observers=[telemetry.observer])
    nothing = UnitOfWorkManager(db.engine(poolclass=NullPool), name="nothing")
    telemetry.observer.measure(manager)
    telemetry.observer.measure(nothing)
    inside, leave = asyncio.Event(), asyncio.Event()

    @transactional(using=manager, retries=1)
    async def hold():
        await current_session(manager).execute(text("SELECT 1"))
        inside.set()
        await leave.wait()

    narrow(manager, hold, width=2)
    running = asyncio.create_task(hold())
    await inside.wait()
    own, turns = {"sqla_uow.manager": "bank"}, {"sqla_uow.manager": "bank", "sqla_uow.function": "hold()"}
    pool = {"db.client.connection.pool.name": "bank"}
    assert telemetry.values("sqla_uow.contention.width") == [("{call}", 2, turns)]
    assert telemetry.values("sqla_uow.contention.running") == [("{call}", 1, turns)]
    assert telemetry.values("sqla_uow.contention.waiting") == [("{call}", 0, turns)]
    found = telemetry.values("sqla_uow.open")
    assert ("{attempt}", 1, own) in found
    assert ("{attempt}", 0, {"sqla_uow.manager": "nothing"}) in found
    states = [pool | {"db.client.connection.state": state} for state in ("used", "idle")]
    assert telemetry.values("db.client.connection.count") == [
        ("{connection}", 1, states[0]),
        ("{connection}", 0, states[1]),
    ]
    assert telemetry.values("db.client.connection.max") == [("{connection}", 3, pool)]
    leave.set()
    await running
    del nothing
    assert [attributes for _, _, attributes in telemetry.values("sqla_uow.open")] == [own]


async def test_statements_are_in_the_same_trace(db, telemetry):
    """With OpenTelemetry's own instrumentation of SQLAlchemy: their spans are children of the attempt's."""
    engine = db.engine()
    manager = UnitOfWorkManager(engine, observers=[telemetry.observer])
    instrumentor = SQLAlchemyInstrumentor()
    instrumentor.instrument(
        engine=engine.sync_engine, tracer_provider=telemetry.tracer_provider, meter_provider=telemetry.meter_provider,
        skip_dep_check=True,
    )  # fmt: skip
    try:
        async with manager.begin() as unit:
            unit.session.add(Note(text="written"))
            await unit.session.flush()
            await unit.session.execute(select(Note))
    finally:
        instrumentor.uninstrument()
    (attempt,) = telemetry.named("attempt")
    statements = [span for span in telemetry.spans if span.name.startswith(("INSERT", "SELECT"))]
    assert len(statements) >= 2
    assert all(is_below(span, attempt) for span in statements)
    assert await db.scalar("SELECT count(*) FROM note") == 1


def test_it_is_loaded_only_where_it_is_asked_for():
    """The library, with a manager that has observers, does not import OpenTelemetry."""
    code = (
        "import sys, sqla_uow, sqla_uow.events, sqla_uow._api.manager, sqla_uow_starlette\n"
        "assert not any(name.split('.')[0] == 'opentelemetry' for name in sys.modules)\n"
        "import sqla_uow.opentelemetry\n"
        "assert 'opentelemetry.trace' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert importlib.import_module("sqla_uow.opentelemetry").__all__ == ["OpenTelemetryObserver"]


@pytest.mark.drivers("sqlite")
async def test_without_providers_it_uses_the_global_ones(db):
    """Which do nothing where none were set."""
    manager = UnitOfWorkManager(db.engine(), observers=[OpenTelemetryObserver()])
    async with manager.begin() as unit:
        unit.session.add(Note(text="written"))
    assert await db.scalar("SELECT count(*) FROM note") == 1
