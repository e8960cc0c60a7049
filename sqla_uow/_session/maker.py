"""What makes the sessions of units over one engine."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Generic

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from typing_extensions import TypeVar

from sqla_uow._databases.database import Database
from sqla_uow._session.engine import UnitEngine
from sqla_uow._session.pool import install
from sqla_uow._session.session import UnitSession, unit_session_class
from sqla_uow._session.watched_session import watching

if TYPE_CHECKING:
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow.typing import LazyLoads

__all__ = ["SessionMaker"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


class SessionMaker(Generic[S]):
    """Makes the sessions of units.

    Args:
        bind: an async engine, or an `async_sessionmaker` bound to one.
        lazy_loads: what its sessions do with lazy loads.

    Raises:
        TypeError: `bind` is neither of them; or a maker with ``binds=``, without a bind, or bound to a connection; or one
            whose session class cannot be made as a unit needs it.
        ValueError: the engine is in AUTOCOMMIT, where there is no transaction.
    """

    def __init__(self, bind: AsyncEngine | async_sessionmaker[S], lazy_loads: LazyLoads = "allow") -> None:
        engine, self._maker = _engine_and_maker(bind)
        self.database: Database = Database(engine)
        self._session_class = watching(unit_session_class(_sync_class(self._maker)), lazy_loads)
        if self._make(engine).sync_session.twophase:
            raise TypeError(
                f"{self._maker.class_.__name__} is made with twophase=True, but a unit is one transaction on one engine, and "
                "knows what became of one COMMIT; leave it out"
            )
        shared = self.database.within is not None or isinstance(self.database.pool, StaticPool)
        install(self.database, shared=shared)

    def session(self, transaction: Transaction) -> S:
        """Make the session of one unit; no connection is taken."""
        session = self._make(UnitEngine.for_unit(self.database, transaction))
        sync_session = session.sync_session
        assert isinstance(sync_session, UnitSession)
        sync_session.transaction_of_unit = transaction
        return session

    def over(self, engine: AsyncEngine) -> async_sessionmaker[S]:
        """Return a maker of the same sessions over another engine."""
        maker = copy.copy(self._maker)
        maker.kw = {**maker.kw, "bind": engine}
        return maker

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
