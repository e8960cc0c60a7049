"""What the public names of sqla_uow are to a type checker; checked by `tox -e types`, against the wheel.

Nothing here runs. A case is a function; `assert_type` holds for mypy and pyright alike, or is written for each.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, TypeVar, assert_type
from uuid import UUID, uuid4

from fastapi import FastAPI
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider
from sqlalchemy import Column, Connection, MetaData
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlalchemy.orm.exc import StaleDataError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from sqla_uow import (
    IsolationLevel,
    Propagation,
    RetryPolicy,
    Scope,
    Status,
    UnitOfWork,
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    before_commit,
    current_session,
    current_unit,
    errors,
    is_retryable,
    session_proxy,
    transactional,
)
from sqla_uow.alembic import (
    AddVersionColumnOp,
    CreateVersionTriggerOp,
    DropVersionColumnOp,
    UtcTimestamp,
    install,
    migration_lock,
    run_migrations,
)
from sqla_uow.events import AttemptEvent, Call, Observer, OutcomeEvent, RetryEvent
from sqla_uow.idempotency import Claim, IdempotencyKeys, Key, Record
from sqla_uow.mixins import (
    Versioned,
    VersionedByTimestamp,
    VersionedByUUID,
    VersionedByXmin,
    expect_version,
    get_versioned,
    next_version,
    touch,
)
from sqla_uow.opentelemetry import OpenTelemetryObserver
from sqla_uow.pytest_plugin import (
    AssertNoLeaks,
    AssertNumQueries,
    CaptureAfterCommit,
    CountQueries,
    Faults,
    RolledBack,
    RunTwice,
)
from sqla_uow.testing import (
    CapturedHook,
    Fault,
    FaultPlan,
    FaultPoint,
    Queries,
    assert_max_num_queries,
    assert_no_leaks,
    assert_num_queries,
    cancel_at,
    capture_after_commit,
    count_queries,
    rolled_back,
    run_twice,
)
from sqla_uow.typing import Contention, ContentionGroup, LazyLoads, PoolState, Statistics
from sqla_uow_starlette import (
    AnyVersioned,
    Idempotency,
    PreconditionError,
    UnitOfWorkMiddleware,
    check_preconditions,
    dispose_on_shutdown,
    etag,
    exception_handlers,
)

T = TypeVar("T")


class AuditedSession(AsyncSession):
    """A session class of the user's."""

    auditor: str = "nobody"


# ---- managers: their session type comes from what they are built over


def manager_over_an_engine(engine: AsyncEngine) -> None:
    assert_type(UnitOfWorkManager(engine), UnitOfWorkManager[AsyncSession])


def manager_over_a_sessionmaker(maker: async_sessionmaker[AuditedSession]) -> None:
    assert_type(UnitOfWorkManager(maker), UnitOfWorkManager[AuditedSession])


def manager_with_every_option(engine: AsyncEngine) -> None:
    manager = UnitOfWorkManager(
        engine,
        name="reports",
        isolation="REPEATABLE READ",
        retries=3,
        timeout=1.5,
        retry=RetryPolicy(base=0.005, cap=0.5, sleep=asyncio.sleep),
        ambiguous_commit="verify",
    )
    assert_type(manager, UnitOfWorkManager[AsyncSession])


def activated_manager(manager: UnitOfWorkManager[AuditedSession]) -> None:
    assert_type(manager.activate(), AbstractContextManager[UnitOfWorkManager[AuditedSession]])
    with manager.activate() as active:
        assert_type(active, UnitOfWorkManager[AuditedSession])


# ---- blocks: the unit, and through it the session, of the manager's type


async def block(manager: UnitOfWorkManager[AuditedSession]) -> None:
    assert_type(manager.begin(), AbstractAsyncContextManager[UnitOfWork[AuditedSession]])
    async with manager.begin(isolation="SERIALIZABLE", read_only=True, propagation="requires_new", timeout=2) as unit:
        assert_type(unit, UnitOfWork[AuditedSession])
        assert_type(unit.session, AuditedSession)
        assert_type(unit.session.auditor, str)


async def value_of_a_block(manager: UnitOfWorkManager[AsyncSession]) -> int:
    async with manager.begin() as unit:  # it swallows nothing, so no `return` is missing below
        return unit.attempt


async def attempts(manager: UnitOfWorkManager[AuditedSession]) -> None:
    assert_type(
        manager.attempts(retries=5),
        AsyncIterator[AbstractAsyncContextManager[UnitOfWork[AuditedSession]]],
    )
    async for attempt in manager.attempts(retries=5, isolation="SERIALIZABLE", read_only=False, timeout=None):
        async with attempt as unit:
            assert_type(unit.session, AuditedSession)


async def scope(manager: UnitOfWorkManager[AsyncSession]) -> None:
    async with manager.scope():
        assert_type(current_session(), AsyncSession)


def unit_attributes(unit: UnitOfWork[AuditedSession]) -> None:
    assert_type(unit.attempt, int)
    assert_type(unit.is_last_attempt, bool)
    assert_type(unit.status, Status)
    assert_type(unit.isolation, IsolationLevel | None)
    assert_type(unit.read_only, bool)
    assert_type(unit.has_written, bool)
    unit.doom()
    unit.doom("stock is empty")


# ---- @transactional: the function's own signature and result, bare and called


@transactional
async def bare(source: int, /, target: str, *rest: bytes, note: str = "") -> list[int]:
    """Keep every kind of parameter."""
    return [source, len(target), len(rest), len(note)]


@transactional(retries=5, isolation="SERIALIZABLE")
async def called(source: int, *, amount: float | None = None) -> timedelta:
    """Keep them also with options."""
    return timedelta(days=source * (amount or 1))


@transactional(
    using="reports",
    retries=None,
    isolation=None,
    read_only=True,
    propagation="nested",
    timeout=timedelta(seconds=3).total_seconds(),
    retry=RetryPolicy(),
    retry_on=lambda error: isinstance(error, KeyError),
)
async def with_every_option() -> None: ...


@transactional()
async def without_options() -> None: ...


@transactional
@transactional(propagation="requires_new")
async def stacked(key: int) -> str:
    """Keep the signature through two of them."""
    return str(key)


@transactional
async def generic(value: T) -> list[T]:
    """Keep what is generic generic."""
    return [value]


async def calls() -> None:
    assert_type(await bare(1, "two", b"3", note="four"), list[int])
    assert_type(await bare(1, target="two"), list[int])
    assert_type(await called(1), timedelta)
    assert_type(await called(1, amount=2.5), timedelta)
    assert_type(await with_every_option(), None)
    assert_type(await without_options(), None)
    assert_type(await stacked(1), str)
    coroutine = assert_type(called(1), Coroutine[Any, Any, timedelta])
    assert_type(await asyncio.create_task(coroutine), timedelta)


async def call_of_a_generic_function() -> None:
    assert_type(await generic(1), list[int])
    assert_type(await generic("one"), list[str])


def names() -> None:
    assert_type(bare.__name__, str)
    assert_type(called.__qualname__, str)
    assert_type(called.__doc__, str | None)


def using_a_manager(manager: UnitOfWorkManager[AuditedSession]) -> Callable[[int], Awaitable[int]]:
    @transactional(using=manager)
    async def count(up_to: int) -> int:
        return up_to

    return count


class Service:
    """Methods are functions too."""

    @transactional
    async def method(self, key: int) -> str:
        return str(key)

    @transactional(read_only=True)
    async def method_with_options(self, *, key: int) -> str:
        return str(key)

    @classmethod
    @transactional(retries=2)
    async def class_method(cls, key: int) -> "Service":
        return cls()

    @staticmethod
    @transactional
    async def static_method(key: int) -> str:
        return str(key)


class SpecialService(Service):
    """An override keeps to the overridden method's type."""

    @transactional
    async def method(self, key: int) -> str:
        return await super().method(key)


async def methods(service: Service) -> None:
    assert_type(await service.method(1), str)
    assert_type(await service.method_with_options(key=1), str)
    assert_type(await Service.method(service, 1), str)
    assert_type(await Service.class_method(1), Service)
    assert_type(await service.class_method(1), Service)
    assert_type(await Service.static_method(1), str)
    assert_type(await service.static_method(1), str)
    assert_type(await SpecialService().method(1), str)


# ---- the current unit and its hooks


def current(manager: UnitOfWorkManager[AsyncSession]) -> None:
    assert_type(current_session(), AsyncSession)
    assert_type(current_session("reports"), AsyncSession)
    assert_type(current_session(manager), AsyncSession)
    assert_type(current_unit("reports").session, Any)
    assert_type(current_unit(manager).session, AsyncSession)
    assert_type(session_proxy(), AsyncSession)
    assert_type(current_unit().attempt, int)


class OwnSession(AsyncSession):
    """A class of one's own, as SQLModel has one."""


def of_own_class(manager: UnitOfWorkManager[OwnSession]) -> None:
    assert_type(current_session(manager), OwnSession)
    assert_type(current_unit(manager), UnitOfWork[OwnSession])
    assert_type(session_proxy(manager), OwnSession)


def notify(address: str, *, subject: str = "") -> int:
    """Do what hooks do; the result is dropped."""
    return len(address + subject)


async def notify_later(address: str) -> None:
    """Do it with an await."""
    await asyncio.sleep(len(address))


def hooks(unit: UnitOfWork[AsyncSession]) -> None:
    after_commit(notify, "a@example.org", subject="paid")
    after_commit(notify_later, "a@example.org")
    after_commit(lambda: None)
    before_commit(notify, "a@example.org")
    after_rollback(notify_later, address="a@example.org")
    unit.after_commit(notify, "a@example.org", subject="paid")
    unit.before_commit(notify_later, "a@example.org")
    unit.after_rollback(notify, "a@example.org")


# ---- the rest


def literals() -> None:
    levels: list[IsolationLevel] = ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
    propagations: list[Propagation] = ["required", "requires_new", "nested", "mandatory", "durable"]
    del levels, propagations


def every_status(status: Status) -> str:
    match status:
        case Status.NEW | Status.ACTIVE | Status.DOOMED:
            return "open"
        case Status.COMMITTED | Status.ROLLED_BACK | Status.AMBIGUOUS:
            return "ended"


def retryable(error: BaseException) -> None:
    assert_type(is_retryable(error), bool)


def error_tree(error: errors.ConflictError) -> None:
    parents: dict[type[BaseException], type[BaseException]] = {
        errors.NoManagerError: LookupError,
        errors.NoUnitError: LookupError,
        errors.TaskBoundaryError: RuntimeError,
        errors.IsolationConflictError: errors.PropagationError,
        errors.StaleVersionError: StaleDataError,
        errors.TransactionTimeoutError: TimeoutError,
        errors.LazyLoadError: InvalidRequestError,
        errors.LateCommitWarning: UserWarning,
        errors.NPlusOneWarning: UserWarning,
    }
    del parents
    assert_type(error.attempts, int)
    assert_type(error.elapsed, float)


def lazy_loads(engine: AsyncEngine, chosen: LazyLoads, error: errors.LazyLoadError) -> None:
    assert_type(UnitOfWorkManager(engine, lazy_loads="warn").lazy_loads, LazyLoads)
    UnitOfWorkManager(engine, lazy_loads=chosen)
    assert_type(error.attribute, str)
    assert_type(error.option, str | None)


def failed_hooks(error: errors.AfterCommitError) -> None:
    assert_type(error.exceptions, tuple[Exception | ExceptionGroup[Exception], ...])


# ---- version columns


class Base(DeclarativeBase):
    pass


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Order(Versioned, Base):
    __tablename__ = "orders"
    __version_follows__ = ("lines",)
    id: Mapped[int] = mapped_column(primary_key=True)


class ByUUID(VersionedByUUID, Base):
    __tablename__ = "by_uuid"
    id: Mapped[int] = mapped_column(primary_key=True)


class ByTimestamp(VersionedByTimestamp, Base):
    __tablename__ = "by_timestamp"
    __version_attr__ = "changed_at"
    id: Mapped[int] = mapped_column(primary_key=True)


class ByXmin(VersionedByXmin, Base):
    __tablename__ = "by_xmin"
    id: Mapped[int] = mapped_column(primary_key=True)


class OtherColumn(Versioned, Base):
    __tablename__ = "other_column"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column("lock_version")


class Dataclass(Versioned, DataclassBase):
    __tablename__ = "dataclass"
    id: Mapped[int] = mapped_column(primary_key=True)


async def versions(session: AsyncSession) -> None:
    order = await get_versioned(session, Order, 1, version=3, with_for_update=True)
    assert_type(order, Order)
    assert_type(order.version, int)
    assert_type((await get_versioned(session, ByUUID, 1, version=uuid4())).version, UUID)
    assert_type((await get_versioned(session, ByTimestamp, 1, version=order)).version, datetime)
    assert_type((await get_versioned(session, ByXmin, 1, version=1)).version, int)
    assert_type(Dataclass(id=1).version, int)
    assert_type(next_version(Order), dict[str, Any])
    expect_version(order, 3)
    touch(order)


def stale(error: errors.StaleVersionError) -> None:
    assert_type(error.model, type[Any] | None)
    assert_type(error.key, tuple[Any, ...] | None)
    assert_type(error.expected, Any)
    assert_type(error.found, Any)


# ---- migrations


async def env(engine: AsyncEngine, metadata: MetaData) -> None:
    install()
    await run_migrations(engine, target_metadata=metadata)
    await run_migrations(engine, timeout=None, compare_type=True)


def one_runner(connection: Connection) -> None:
    with migration_lock(connection, timeout=5) as held:
        assert_type(held, None)


def in_a_program() -> None:
    AddVersionColumnOp("orders", kind="uuid", lock_timeout=0.5, retries=3).reverse()
    DropVersionColumnOp("orders", "rev", schema="shop")
    CreateVersionTriggerOp("orders").reverse()
    column: Column[datetime] = Column("version", UtcTimestamp())
    assert_type(column, Column[datetime])


# ---- tests


async def twice(number: int, *, by: str) -> str:
    return by * number


async def kit(engine: AsyncEngine, manager: UnitOfWorkManager[AuditedSession]) -> None:
    async with rolled_back(engine, isolation="SERIALIZABLE") as inside:
        assert_type(inside, AsyncEngine)
    async with rolled_back(manager) as same:
        assert_type(same, UnitOfWorkManager[AuditedSession])
    with capture_after_commit(execute=True) as hooks:
        assert_type(hooks, list[CapturedHook])
    await hooks[0]()
    with count_queries(manager) as queries, assert_num_queries(engine, 1), assert_max_num_queries(engine, 1):
        assert_type(queries.count, int)
    with assert_no_leaks(engine), assert_no_leaks(manager):
        pass
    with FaultPlan(manager, "lost", at="after commit", nth=2, times=3) as plan:
        assert_type(plan.struck, int)
    fault: Fault = "latency"
    point: FaultPoint = "flush"
    FaultPlan(engine, fault, at=point, seconds=1)
    assert_type(await cancel_at(1, asyncio.sleep(0)), bool)
    assert_type(await run_twice(twice)(1, by="x"), str)


async def fixtures(  # noqa: PLR0917  # one for each fixture
    rolled_back_: RolledBack,
    capture: CaptureAfterCommit,
    count: CountQueries,
    number: AssertNumQueries,
    leaks: AssertNoLeaks,
    faults: Faults,
    in_vain: RunTwice,
) -> None:
    assert_type(rolled_back_(isolation="SERIALIZABLE"), AbstractAsyncContextManager[UnitOfWorkManager[Any]])
    assert_type(capture(execute=True), AbstractContextManager[list[CapturedHook]])
    assert_type(count(), AbstractContextManager[Queries])
    assert_type(number(1), AbstractContextManager[Queries])
    assert_type(leaks(), AbstractContextManager[None])
    assert_type(faults("conflict", at="commit", nth=1, times=1), FaultPlan)
    assert_type(await in_vain(twice)(1, by="x"), str)


# ---- seen from outside


class Watching(Observer):
    def on_attempt(self, event: AttemptEvent, /) -> None:
        assert_type(event.attempt, int)
        assert_type(event.isolation, IsolationLevel | None)
        assert_type(event.status, Status)
        call: Call = event.call
        assert_type({call: event.elapsed}[event.call], float)

    def on_retry(self, event: RetryEvent, /) -> None:
        assert_type(event.reason, str)
        assert_type(event.code, str | None)
        assert_type(event.wait, float)
        assert_type(event.error, type[BaseException] | None)
        assert_type(event.commit_seconds, float | None)

    def on_outcome(self, event: OutcomeEvent, /) -> None:
        assert_type(event.gave_up, bool)
        assert_type(event.doomed, bool)


def observed(engine: AsyncEngine) -> None:
    manager = UnitOfWorkManager(engine, observers=[Watching(), OpenTelemetryObserver()])
    assert_type(manager.scope(observers=(Watching(),)), AbstractAsyncContextManager[Scope])
    assert_type(UnitOfWorkManager(engine, replicas=[engine], replica_wait=0.1).replicas, tuple[AsyncEngine, ...])
    assert_type(manager.scope(position="0-1"), AbstractAsyncContextManager[Scope])
    seen: Statistics = manager.statistics()
    assert_type(seen.begun, int)
    assert_type(seen.pool, PoolState)
    assert_type(seen.pool.size, int | None)
    for (reason, code), number in seen.retries.items():
        assert_type(reason, str)
        assert_type(code, str | None)
        assert_type(number, int)
    for name, state in seen.contention:
        assert_type(name, str)
        assert_type(state, Contention)
    assert_type(manager.contention(), tuple[ContentionGroup, ...])
    assert_type(manager.contention("POST /transfers"), Contention)


def told_to_opentelemetry(
    manager: UnitOfWorkManager[AsyncSession], tracer_provider: TracerProvider, meter_provider: MeterProvider
) -> None:
    telemetry = OpenTelemetryObserver(tracer_provider=tracer_provider, meter_provider=meter_provider)
    assert_type(telemetry.measure(manager), None)


# ---- the web package


def fastapi_and_starlette(manager: UnitOfWorkManager[AsyncSession]) -> None:
    middleware = [Middleware(UnitOfWorkMiddleware, manager=manager, server_timing=True)]
    Starlette(middleware=middleware, exception_handlers=exception_handlers, lifespan=dispose_on_shutdown(manager))
    FastAPI(middleware=middleware, exception_handlers=exception_handlers)
    Starlette(exception_handlers={**exception_handlers, ValueError: answer})


async def answer(request: Request, error: Exception) -> Response:
    return Response(str(error), 400, headers=dict(request.headers))


def preconditions(request: Request, order: Order, by_uuid: ByUUID | None, by_xmin: ByXmin) -> None:
    assert_type(etag(order), str)
    assert_type(etag(by_xmin), str)
    check_preconditions(request, order)
    check_preconditions(request, by_uuid, required=True)
    check_preconditions(request, None)
    either: AnyVersioned = order
    check_preconditions(request, either)


def refused(error: PreconditionError) -> None:
    assert_type(error.code, str)
    assert_type(error.status_code, int)


# ---- idempotency keys

keys = IdempotencyKeys(MetaData(), name="done", keep=timedelta(days=2), using="orders")


def request_of(amount: int, request: str) -> str:
    return f"{amount}:{request}"


@transactional(retries=5)
@keys.once(space="payments", key=request_of, fingerprint=lambda amount, request: b"%d" % amount)
async def pay(amount: int, request: str) -> dict[str, int]:
    assert_type(await keys.claim("orders", request, fingerprint=b"5"), bool)
    assert_type(await keys.result("orders", request), Any)
    return {"amount": amount}


async def repeat(manager: UnitOfWorkManager, unit: UnitOfWork) -> None:
    assert_type(await pay(5, request="r"), dict[str, int])
    assert_type(await keys.purge(manager, limit=10), int)
    assert_type(await keys.take(unit, Key.of("orders", "a")), Record | Claim)
    assert_type(await keys.look(manager, Key.of("orders", "a")), Record | Claim)


class Encrypted:
    def encode(self, plain: bytes, /) -> bytes:
        return plain

    def decode(self, stored: bytes, /) -> bytes:
        return stored


def keyed(manager: UnitOfWorkManager) -> Middleware:
    idempotency = Idempotency(
        keys, caller=lambda scope: str(scope["user"]), methods=["POST"], required=True, keep=timedelta(hours=1), wait=1,
        max_response=1000, headers={"etag"}, fingerprint=lambda scope: None, codec=Encrypted(),
    )  # fmt: skip
    return Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True, idempotency=idempotency)
