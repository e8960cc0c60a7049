"""The driver's own connection, which users and other libraries take: what is sent there SQLAlchemy tells nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from sqlalchemy.util import await_only

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.engine import Connection

__all__ = ["CommitAnswer", "RawCalls", "begin_now", "listen_to_commit", "raw_connection", "tell_raw_calls"]


def raw_connection(connection: Connection) -> Any:
    """Return the driver's own connection, without the note that it is taken; see `UnitConnection.connection`."""
    raw = connection.__dict__.get("raw")  # a unit's connection looks it up once
    if raw is not None:
        return raw
    lent: Any = connection._dbapi_connection
    if lent is None:  # lost, or closed
        return None
    return connection.dialect.get_driver_connection(lent.dbapi_connection)


def begin_now(connection: Connection) -> None:
    """Have asyncpg begin: SQLAlchemy's adapter does so with its own first statement only, the other drivers with any.

    What goes over the driver's own connection before, COPY say, would be outside the transaction.
    """
    lent: Any = connection._dbapi_connection
    if connection.dialect.driver == "asyncpg" and not raw_connection(connection).is_in_transaction():
        await_only(lent.dbapi_connection._start_transaction())


class CommitAnswer:
    """asyncpg's connection as its transaction sees it at COMMIT: keeps the server's answer, which the transaction drops."""

    __slots__ = ("_pool_release_ctr", "_raw", "_top_xact", "tag")  # what the transaction looks at, and nothing else

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._pool_release_ctr: int = raw._pool_release_ctr
        self._top_xact: Any = raw._top_xact
        self.tag: str | None = None

    async def execute(self, query: str) -> str:
        self._raw._top_xact = self._top_xact
        self.tag = tag = await self._raw.execute(query)
        return str(tag)

    def is_closed(self) -> bool:
        return bool(self._raw.is_closed())

    @property
    def is_rollback(self) -> bool:
        return self.tag == "ROLLBACK"


def listen_to_commit(connection: Connection) -> CommitAnswer | None:
    """Have the answer to the COMMIT that is about to be sent kept; None where there is nothing to listen to."""
    lent: Any = connection._dbapi_connection
    transaction = getattr(lent.dbapi_connection, "_transaction", None)  # of the adapter of asyncpg
    if transaction is None:
        return None
    transaction._connection = answer = CommitAnswer(transaction._connection)
    return answer


class RawCalls(Protocol):
    """Who is told of statements on the driver's own connection."""

    def begin_raw(self) -> object: ...

    def raw_failed(self, error: BaseException) -> None: ...

    def end_raw(self, begun: object) -> None: ...


def tell_raw_calls(driver: str, raw: Any, calls: RawCalls) -> Callable[[], object] | None:
    """Have statements on the driver's own connection told, where its transaction does not remember their failures.

    PostgreSQL fails the whole transaction, which the driver knows.  MariaDB and SQLite undo the statement only.

    Args:
        driver: its name.
        raw: its connection.
        calls: is told.

    Returns:
        what ends it; None where the driver's word is enough.
    """
    name = {"asyncmy": "query", "aiomysql": "query", "aiosqlite": "_execute"}.get(driver)
    if name is None:
        return None
    send: Callable[..., Awaitable[Any]] = getattr(raw, name)  # every statement of every cursor comes by it

    async def sending(*args: Any, **kwargs: Any) -> Any:
        begun = calls.begin_raw()
        try:
            return await send(*args, **kwargs)
        except Exception as error:
            calls.raw_failed(error)
            raise
        finally:
            calls.end_raw(begun)

    setattr(raw, name, sending)
    attributes = cast("dict[str, object]", vars(raw))
    return lambda: attributes.pop(name, None)
