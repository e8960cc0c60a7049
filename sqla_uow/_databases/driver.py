"""The driver's own connection, which users and other libraries take: what is sent there SQLAlchemy tells nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.util import await_only

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from sqlalchemy.engine import Connection

__all__ = [
    "CommitAnswer", "RawCalls", "begin_now", "listen_to_commit", "raw_connection", "tell_next_results", "tell_raw_calls",
]  # fmt: skip


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

    def raw_sent(self, text: str) -> None: ...

    def end_raw(self, begun: object) -> None: ...


_CALLS = {
    # Every statement of every cursor comes by the first of them.
    "asyncmy": ("query", "commit", "rollback", "begin", "autocommit"),
    "aiomysql": ("query", "commit", "rollback", "begin", "autocommit"),
    "aiosqlite": ("_execute",),
}


def tell_raw_calls(driver: str, raw: Any, calls: RawCalls) -> Callable[[], object]:
    """Have statements on the driver's own connection told: that they fail, and that they may have ended the transaction.

    That a transaction has failed PostgreSQL's drivers know by themselves; MariaDB and SQLite undo the statement only.  That
    one was ended and the next one begun, no driver knows afterwards.

    Args:
        driver: its name.
        raw: its connection.
        calls: is told.

    Returns:
        what ends it.
    """
    if driver == "asyncpg":  # takes no attributes; its own log comes one turn of the loop later, before the next answer

        def sent(logged: Any) -> None:
            if logged.exception is None:
                calls.raw_sent(logged.query)
            else:
                calls.raw_failed(logged.exception)

        raw.add_query_logger(sent)
        return lambda: raw.remove_query_logger(sent)
    told = {"wait": _observed(raw.wait, calls)} if driver == "psycopg" else {}
    told |= {name: _told(name, getattr(raw, name), calls) for name in _CALLS.get(driver, ())}
    for name, call in told.items():
        setattr(raw, name, call)

    return lambda: _restore(raw, told)


def _told(name: str, send: Callable[..., Awaitable[Any]], calls: RawCalls) -> Callable[..., Awaitable[Any]]:
    async def sending(*args: Any, **kwargs: Any) -> Any:
        begun = calls.begin_raw()
        try:
            result = await send(*args, **kwargs)
        except Exception as error:
            calls.raw_failed(error)
            raise
        finally:
            calls.end_raw(begun)
        if begun is not None:
            calls.raw_sent(_text(name, args))
        return result

    return sending


def _observed(wait: Callable[..., Awaitable[Any]], calls: RawCalls) -> Callable[..., Awaitable[Any]]:
    """Look at the transaction after each wait for the server: all of psycopg's operations are made of such."""

    async def waiting(*args: Any, **kwargs: Any) -> Any:
        try:
            result = await wait(*args, **kwargs)
        except Exception as error:
            calls.raw_failed(error)
            raise
        calls.raw_sent("")
        return result

    return waiting


def _text(name: str, args: tuple[Any, ...]) -> str:
    """Return the SQL of a call."""
    if name == "begin":
        return name
    at = {"query": 0, "_execute": 1}.get(name)
    text = "" if at is None or len(args) <= at else args[at]
    if isinstance(text, (bytes, bytearray)):
        return text.decode("latin-1")
    return text if isinstance(text, str) else ""


def tell_next_results(raw: Any, failed: Callable[[BaseException], object]) -> Callable[[], object]:
    """Have the failures of further results told, of a procedure say: SQLAlchemy reads them while it closes the cursor.

    Args:
        raw: MariaDB's connection.
        failed: is told.

    Returns:
        what ends it.
    """
    read: Callable[..., Awaitable[Any]] = raw.next_result

    async def reading(*args: Any, **kwargs: Any) -> Any:
        try:
            return await read(*args, **kwargs)
        except Exception as error:
            failed(error)
            raise

    raw.next_result = reading
    return lambda: _restore(raw, ("next_result",))


def _restore(raw: Any, names: Iterable[str]) -> None:
    """Uncover the connection's own methods."""
    for name in names:
        if name in vars(raw):
            delattr(raw, name)
