"""What a manager is bound to: one engine, the sessions made over it, and what is known of its server."""

from __future__ import annotations

import asyncio
import copy
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool
from sqlalchemy.util import await_only
from typing_extensions import TypeVar

from sqla_uow._databases.distributed import COCKROACHDB, Distributed, distributed, family_of
from sqla_uow._databases.driver import raw_connection
from sqla_uow._databases.levels import check_honoured, engine_options, is_weaker_or_same
from sqla_uow._databases.writer_queue import Turns
from sqla_uow._retry.budget import Budget
from sqla_uow._session.engine import UnitEngine
from sqla_uow._session.pool import install
from sqla_uow._session.session import UnitSession, unit_session_class
from sqla_uow._session.watched_session import watching
from sqla_uow.errors import TaskBoundaryError

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.pool import Pool

    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow.typing import IsolationLevel, LazyLoads

__all__ = ["WITHIN", "Database"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)

WITHIN = "sqla_uow_within"
"""Option of an engine whose transactions are savepoints of one that somebody else ends: who that is."""

_budgets: weakref.WeakKeyDictionary[Pool, Budget] = weakref.WeakKeyDictionary()
_turns: weakref.WeakKeyDictionary[Pool, Turns] = weakref.WeakKeyDictionary()
_owners: weakref.WeakKeyDictionary[Pool, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()
FIRST_LOOK_SECONDS = 0.002
"""Pause between two looks whether another event loop has made the first connection."""
_BOUND_TO_LOOP = ("asyncpg", "asyncmy", "aiomysql")
"""Drivers whose connections work in the event loop only in which they were made."""


class Database(Generic[S]):
    """One engine and the class of its sessions.

    Args:
        bind: an async engine, or an `async_sessionmaker` bound to one.
        lazy_loads: what becomes of them in its sessions.

    Raises:
        TypeError: neither of them; or a maker with ``binds=``, without a bind, or bound to a connection; or one whose
            session class cannot be made as a unit needs it.
        ValueError: an engine in AUTOCOMMIT, where there is no transaction.
    """

    def __init__(self, bind: AsyncEngine | async_sessionmaker[S], lazy_loads: LazyLoads = "allow") -> None:
        engine, self._maker = _engine_and_maker(bind)
        self.engine: AsyncEngine = engine
        self.sync_engine: Engine = self.engine.sync_engine
        self.family: str = family_of(self.sync_engine.dialect)
        self.server: Distributed | None = COCKROACHDB if self.sync_engine.dialect.name == "cockroachdb" else None
        self._recognised = self.sync_engine.dialect.name != "postgresql"
        self._honoured: set[IsolationLevel] = {"SERIALIZABLE"}
        configured = self.sync_engine.get_execution_options().get("isolation_level")
        # create_engine(isolation_level=) is kept in no public place.
        configured = configured or getattr(self.sync_engine.dialect, "_on_connect_isolation_level", None)
        if str(configured).upper() == "AUTOCOMMIT":
            raise ValueError(
                "the engine is in AUTOCOMMIT, where nothing can be rolled back; pass one without isolation_level='AUTOCOMMIT'"
            )
        self._configured: str | None = configured
        self.within: str | None = self.sync_engine.get_execution_options().get(WITHIN)
        self._session_class = watching(unit_session_class(_sync_class(self._maker)), lazy_loads)
        self._engines: dict[tuple[IsolationLevel | None, bool], AsyncEngine] = {}
        self.has_connected: bool = False
        self._first: dict[str, asyncio.AbstractEventLoop] = {}
        self._home: tuple[weakref.ref[asyncio.AbstractEventLoop], weakref.ref[Pool]] | None = None
        if self._make(self.engine).sync_session.twophase:
            raise TypeError(
                f"{self._maker.class_.__name__} is made with twophase=True, but a unit is one transaction on one engine, and "
                "knows what became of one COMMIT; leave it out"
            )
        install(self.sync_engine, shared=self.within is not None or isinstance(self.pool, StaticPool))
        # Of the pool, as managers share it through copies of their engine.
        self.budget: Budget = _budgets.setdefault(self.pool, Budget(time.monotonic()))

    @property
    def limits_statements(self) -> bool:
        """Whether each statement can carry the deadline; SQLAlchemy finds out with the first connection."""
        return bool(getattr(self.sync_engine.dialect, "is_mariadb", False))

    @property
    def system(self) -> str:
        """What OpenTelemetry calls it; MariaDB under the dialect "mysql" is known with the first connection."""
        dialect = self.sync_engine.dialect
        return "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name

    @property
    def driver(self) -> str:
        return self.sync_engine.dialect.driver

    @property
    def pool(self) -> Pool:
        return self.sync_engine.pool

    def session(self, transaction: Transaction) -> S:
        """Make the session of one unit; no connection is taken."""
        session = self._make(self._engine_for(transaction))
        sync_session = session.sync_session
        assert isinstance(sync_session, UnitSession)
        sync_session.transaction_of_unit = transaction
        return session

    def unit_engine(self, transaction: Transaction) -> UnitEngine:
        """Return the engine for units like this one."""
        engine = self._engine_for(transaction).sync_engine
        assert isinstance(engine, UnitEngine)
        return engine

    def _engine_for(self, transaction: Transaction) -> AsyncEngine:
        key = (transaction.isolation, transaction.read_only)
        engine = self._engines.get(key)
        if engine is None:
            options = engine_options(self.family, transaction.isolation, read_only=transaction.read_only)
            engine = self._engines[key] = AsyncEngine(UnitEngine(self.sync_engine, options))
        return engine

    def check_loop(self, loop: asyncio.AbstractEventLoop, *, who: str) -> None:
        """Refuse to take a connection that belongs to another event loop, as most drivers' do, out of the pool.

        Of a loop that is closed they are of no use any more, so new ones are made.

        Raises:
            TaskBoundaryError: the pool is another loop's.
        """
        pool = self.pool
        if self._home is not None and self._home[0]() is loop and self._home[1]() is pool:
            return
        if self.driver in _BOUND_TO_LOOP and not isinstance(pool, NullPool):
            owner = _owners.get(pool)
            other = None if owner is None else owner()
            if other is not None and other is not loop and not other.is_closed():
                raise TaskBoundaryError(
                    f"{who} runs in another event loop than the one whose connections the engine's pool keeps; give each "
                    "loop an engine and a manager of its own, or make the engine with poolclass=NullPool"
                )
            if owner is not None and other is not loop:
                self.sync_engine.dispose(close=False)
                pool = self.pool
            _owners[pool] = weakref.ref(loop)
        self._home = weakref.ref(loop), weakref.ref(pool)

    @contextmanager
    def first_alone(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        """Let one event loop make the engine's first connections; in SQLAlchemy's greenlet.

        SQLAlchemy learns what server it is with the first one, under a lock of asyncio that only one loop can wait for.
        """
        while not self.has_connected and self._first.setdefault("loop", loop) is not loop:
            await_only(asyncio.sleep(FIRST_LOOK_SECONDS))
        try:
            yield
            self.has_connected = True
        finally:
            self._first.clear()

    def maker_over(self, engine: AsyncEngine) -> async_sessionmaker[S]:
        """Return a maker of the same sessions over another engine."""
        maker = copy.copy(self._maker)
        maker.kw = {**maker.kw, "bind": engine}
        return maker

    def turns(self) -> Turns | None:
        """Return the queue of the writers, on SQLite."""
        if self.family != "sqlite":
            return None
        pool = self.pool
        turns = _turns.get(pool)
        if turns is None:
            turns = _turns[pool] = Turns(everyone=isinstance(pool, StaticPool))
        return turns

    def recognise(self, connection: Connection) -> None:
        """Find out which server it is that speaks as PostgreSQL does; nothing is sent."""
        if not self._recognised and self.is_open(connection):
            self.server = distributed(connection)
            self._recognised = True

    def check_honoured(self, connection: Connection, isolation: IsolationLevel | None, *, who: str) -> None:
        """Ask a server that may run another level than it was told, once for each level."""
        if self.server is not None and isolation is not None and isolation not in self._honoured:
            check_honoured(connection, self.server, isolation, who=who)
            self._honoured.add(isolation)

    def keeps_status(self) -> bool:
        """Say whether the server can be asked what became of a transaction."""
        return self.family == "postgresql" and self.within is None and self.server is None

    def makes_tables_apart(self) -> bool:
        """Say whether DDL is no matter of the transaction that it is sent in."""
        return self.family == "mysql" or self.server is not None

    def capacity(self) -> int | None:
        """Return how many connections the pool can lend, None where there is no limit."""
        pool: Any = self.pool
        # QueuePool keeps its overflow in no public place; -1 is no limit.
        overflow = getattr(pool, "_max_overflow", None)
        if overflow is None or overflow < 0:
            return None
        return int(pool.size()) + int(overflow)

    def is_exhausted(self) -> bool:
        """Say whether whoever asks the pool for a connection now must wait."""
        pool: Any = self.pool
        capacity = self.capacity()
        return capacity is not None and pool.checkedout() >= capacity

    def default_isolation(self) -> str | None:
        """Return the level of a unit that asks for none; None before the first connection."""
        if self.family == "sqlite":
            return "SERIALIZABLE"
        if self._configured is not None:
            return self._configured
        # Set by the first connection to what the server says, so a server's own configuration counts.
        return getattr(self.sync_engine.dialect, "default_isolation_level", None)

    def keeps_snapshot(self, isolation: IsolationLevel | None) -> bool:
        """Say whether all statements of a unit at this level see what its first one has seen."""
        level = isolation or self.default_isolation()
        return level is not None and not is_weaker_or_same(level, "READ COMMITTED")

    def is_open(self, connection: Connection | None) -> bool:
        """Say whether the driver still believes in its connection; if not, nothing we send can arrive."""
        if connection is None or connection.closed or connection.invalidated:
            return False
        raw: Any = raw_connection(connection)
        if hasattr(raw, "is_closed"):  # asyncpg
            return not raw.is_closed()
        return not getattr(raw, "closed", False)

    def _make(self, engine: AsyncEngine) -> S:
        try:
            session: S = self._maker(
                bind=engine,
                expire_on_commit=False,
                close_resets_only=False,
                autobegin=True,
                sync_session_class=self._session_class,
            )
        except TypeError as error:
            raise TypeError(
                f"{self._maker.class_.__name__} cannot be made with expire_on_commit, close_resets_only and "
                "sync_session_class; let its __init__ pass keyword arguments on to AsyncSession"
            ) from error
        return session


def _engine_and_maker(bind: object) -> tuple[AsyncEngine, async_sessionmaker[Any]]:
    if isinstance(bind, AsyncEngine):
        return bind, async_sessionmaker[Any](bind)
    if not isinstance(bind, async_sessionmaker):
        raise TypeError(
            f"UnitOfWorkManager got {type(bind).__name__}; pass an AsyncEngine of create_async_engine(), "
            "or an async_sessionmaker bound to one"
        )
    if bind.kw.get("binds"):
        raise TypeError(
            "the sessionmaker has binds=, but a unit is one transaction on one engine; make a manager for each"
        )
    if bind.kw.get("twophase"):
        raise TypeError("the sessionmaker has twophase=True, but a unit is one transaction on one engine; leave it out")
    engine = bind.kw.get("bind")
    if not isinstance(engine, AsyncEngine):
        found = "no bind" if engine is None else f"a bind of type {type(engine).__name__}"
        raise TypeError(f"the sessionmaker has {found}; bind it to an AsyncEngine")
    return engine, bind  # pyright: ignore[reportUnknownVariableType]  # isinstance() cannot tell the session's class


def _sync_class(maker: async_sessionmaker[Any]) -> type[Session]:
    cls = maker.kw.get("sync_session_class") or maker.class_.sync_session_class
    if not isinstance(cls, type) or not issubclass(cls, Session):
        raise TypeError(
            f"sync_session_class is {cls!r}, not a class of Session; pass a subclass of sqlalchemy.orm.Session"
        )
    if cls.get_bind is not Session.get_bind:
        raise TypeError(
            f"{cls.__name__} chooses its engine in get_bind(), but a unit is one transaction on one engine; "
            "make a manager for each engine"
        )
    return cls
