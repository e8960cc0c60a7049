"""What must not pass a type checker; checked by `tox -e types`, against the wheel.

Nothing here runs. Every wrong line says so to both checkers, with the rule that catches it; where a line is right after
all, each of them reports the comment as unnecessary.
"""

from collections.abc import AsyncIterator, Iterator

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.requests import Request

from sqla_uow import (
    RetryPolicy,
    Status,
    UnitOfWork,
    UnitOfWorkManager,
    after_commit,
    before_commit,
    current_session,
    current_unit,
    errors,
    transactional,
)
from sqla_uow.alembic import AddVersionColumnOp, migration_lock, run_migrations
from sqla_uow.mixins import Versioned, expect_version, get_versioned, touch
from sqla_uow.testing import FaultPlan, capture_after_commit, count_queries, rolled_back
from sqla_uow_starlette import check_preconditions, etag

# ---- managers


def manager_over_something_else(url: str, maker: sessionmaker[Session]) -> None:
    UnitOfWorkManager(url)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(maker)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def manager_options(engine: AsyncEngine) -> None:
    UnitOfWorkManager(engine, "reports")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    UnitOfWorkManager(engine, name=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, isolation="SNAPSHOT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, isolation="serializable")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, retries="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, retries=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, timeout="3s")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, lazy_loads="forbid")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, retry=0.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, ambiguous_commit="retry")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, observers=[print])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    UnitOfWorkManager(engine, max_retries=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def manager_is_immutable(manager: UnitOfWorkManager[AsyncSession]) -> None:
    manager.retries = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    manager.isolation = "SERIALIZABLE"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class NotASession: ...


def manager_of_something_else(manager: UnitOfWorkManager[NotASession]) -> None: ...  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeArguments]


# ---- blocks


async def block_options(manager: UnitOfWorkManager[AsyncSession]) -> None:
    manager.begin("SERIALIZABLE")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.begin(isolation="READ COMITTED")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.begin(propagation="requires")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.begin(read_only="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    manager.begin(retries=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.attempts()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.attempts(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    manager.attempts(retries=5, propagation="nested")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def blocks_are_async(manager: UnitOfWorkManager[AsyncSession]) -> None:
    with manager.begin():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    async with manager.activate():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    for _ in manager.attempts(retries=5):  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownVariableType, reportGeneralTypeIssues]
        pass


async def an_attempt_is_no_unit(manager: UnitOfWorkManager[AsyncSession]) -> None:
    async for attempt in manager.attempts(retries=5):
        attempt.doom()  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]


async def session_of_the_manager(manager: UnitOfWorkManager[AsyncSession]) -> None:
    async with manager.begin() as unit:
        unit.session.audit()  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]


def unit_is_read(unit: UnitOfWork[AsyncSession], session: AsyncSession) -> None:
    unit.session = session  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.status = Status.COMMITTED  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.isolation = "SERIALIZABLE"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.read_only = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.doom(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# ---- @transactional: what it decorates


@transactional  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def function() -> None: ...


@transactional(retries=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def function_with_options() -> None: ...


@transactional  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def generator() -> Iterator[int]:
    yield 1


@transactional  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def async_generator() -> AsyncIterator[int]:
    yield 1


@transactional  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
class Factory: ...


@transactional(5)  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType]
async def positional_option() -> None: ...


# ---- @transactional: its options


def always() -> bool:
    return True


def options(engine: AsyncEngine) -> None:
    transactional(retries="5")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(isolation="serializable")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(propagation="mandatory_new")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(read_only=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(timeout="3s")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(using=engine)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(retry=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(retry_on=KeyError("key"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    transactional(retry_on=always)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    transactional(max_retries=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


# ---- @transactional: the signature it keeps


@transactional
async def bare(source: int, *, note: str = "") -> int:
    return source + len(note)


@transactional(retries=5)
async def called(source: int, *, note: str = "") -> int:
    return source + len(note)


class Service:
    @transactional
    async def method(self, key: int) -> str:
        return str(key)


async def calls(service: Service) -> None:
    await bare()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bare("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bare(1, "note")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bare(1, notes="note")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await called()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await called("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await called(1, "note")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await called(1, notes="note")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await service.method()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await service.method("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await Service.method(1)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    number: int = bare(1)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    text: str = await called(1)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    del number, text
    called(1)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]


# ---- the current unit and its hooks


def current(engine: AsyncEngine) -> None:
    current_session(using="reports")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    current_session(engine)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    current_unit(1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def notify(address: str, *, subject: str = "") -> int:
    return len(address + subject)


def hooks(unit: UnitOfWork[AsyncSession]) -> None:
    after_commit(notify)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    after_commit(notify, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    after_commit(notify, "a@example.org", "paid")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    after_commit(notify, "a@example.org", subjects="paid")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    after_commit(notify("a@example.org"))  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    before_commit(notify, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.after_commit(notify, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.before_commit(notify)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    unit.after_rollback(notify, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# ---- the rest


def policy() -> None:
    RetryPolicy(0.01)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RetryPolicy(max_delay=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RetryPolicy().cap = 1.0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def no_such_name() -> None:
    errors.RetryError("")  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]


# ---- version columns


class Base(DeclarativeBase):
    pass


class Order(Versioned, Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)


async def versions(session: AsyncSession, plain: Plain) -> None:
    await get_versioned(session, Order, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await get_versioned(session, Plain, 1, version=1)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    expect_version(plain, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    touch(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# ---- migrations


async def env(engine: AsyncEngine) -> None:
    await run_migrations(engine.sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    migration_lock(engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with engine.connect() as connection:
        await connection.run_sync(migration_lock, 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AddVersionColumnOp("orders", "version", "uuid")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# ---- tests


def kit(engine: AsyncEngine) -> None:
    rolled_back(engine.sync_engine)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    rolled_back(engine, isolation="serializable")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    count_queries(engine.sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    FaultPlan(engine, "meteor")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    FaultPlan(engine, "conflict", "commit")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    capture_after_commit(True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# ---- the web package


def preconditions(request: Request, order: Order, plain: Plain) -> None:
    etag(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    check_preconditions(request, plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    check_preconditions(request, order, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    check_preconditions(order)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
