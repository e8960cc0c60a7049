"""Rows that are fetched as they are read.

SQLAlchemy tells nobody of a fetch.  A statement of another task meanwhile breaks asyncpg's connection; on MariaDB any other
statement drops the rows that are left, without an error.  So each fetch asks the unit, and the unit knows the stream.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy

from sqla_uow._databases.failures import classify
from sqla_uow._tasks.frames import running_task
from sqla_uow.errors import NoUnitError, PropagationError

if TYPE_CHECKING:
    import asyncio

    from greenlet import greenlet

    from sqla_uow._transaction.transaction import Transaction

__all__ = ["open_stream"]


class Stream:
    """The result of a unit whose rows are being read.

    Args:
        transaction: of the unit.
        context: of the stream's statement.
    """

    __slots__ = ("_cursor", "_greenlet", "_is_over", "_name", "_reader", "_rows", "_transaction")

    def __init__(self, transaction: Transaction, context: Any) -> None:
        self._transaction = transaction
        self._cursor: Any = context.cursor
        self._rows: weakref.ref[StreamedRows] | None = None
        self._is_over = False
        self._name = _named(context)
        self._note_reader()

    def rows(self, context: Any) -> StreamedRows:
        """Return how its rows are fetched.

        The reference is weak: from a result that nobody holds any more, nobody can read.
        """
        rows = StreamedRows(self, context)
        self._rows = weakref.ref(rows)
        return rows

    def check_unread(self, what: str) -> None:
        """Refuse what would cut off the rows that are still being read: MariaDB's drivers drop them without an error.

        Raises:
            PropagationError: this task reads them.
            TaskBoundaryError: another task reads them.
        """
        if self._is_left() or self._is_reading_here():
            return
        transaction = self._transaction
        reader = self._other_reader()
        by = "" if reader is None else f" by task {reader.get_name()!r}"
        message = (
            f"{what} in {transaction.name} while the rows of {self._name} are still being read{by}; read it to its end or close "
            "it first, or read by pages"
        )
        if reader is not None:
            raise transaction.owner.refuse(message)
        error = PropagationError(message)
        if not transaction.scope_read:  # it has nothing to lose
            transaction.doom.mark(error)
        raise error

    def close_if_left(self) -> None:
        """Close a stream that nobody can read on, before something else is sent; in SQLAlchemy's greenlet."""
        if not self._is_left():
            return
        try:
            self.finish()
            self._cursor.close()
        except Exception as error:
            connection = self._transaction.connection
            if connection is None or connection.invalidated:
                return  # nothing is left to close but the driver's own object, which would warn that it was not
            self._transaction.doom.mark(error, failure=classify(error), hard=True)
            raise

    def end(self) -> None:
        """Let nobody read on: the end of its savepoint, or of the transaction, cuts the rows off."""
        self._is_over = True

    def body_returned(self) -> None:
        """The body has returned: let nobody read on.

        Raises:
            TaskBoundaryError: another task still reads.
        """
        if self._other_reader() is not None:
            self.check_unread("the end was reached")
        self.end()

    def _is_left(self) -> bool:
        """Say whether nobody can read on."""
        return self._is_over or self._rows is None or self._rows() is None

    def _is_reading_here(self) -> bool:
        """Say whether what is sent now belongs to the step that reads the rows, as that of ``selectinload()`` does.

        Not on MariaDB, whose connection has room for one result.
        """
        return not self._transaction.database.system.one_result and self._greenlet() is getcurrent()

    def _other_reader(self) -> asyncio.Task[Any] | None:
        """Return the task that reads it, if that is another one and goes on."""
        reader = None if self._reader is None else self._reader()
        return None if reader is None or reader.done() or reader is running_task() else reader

    def begin_fetch(self) -> asyncio.Task[Any] | None:
        """Begin to fetch, as one operation of the unit.

        Returns:
            what `end_fetch` needs.

        Raises:
            NoUnitError: no row can be fetched any more.
            TaskBoundaryError: another task uses the unit.
        """
        transaction = self._transaction
        if self._is_over or not transaction.phase.is_open:
            raise NoUnitError(
                f"the rows of {self._name} were read on after its part of {transaction.name} had ended; read them to "
                "their end inside it, or read by pages"
            )
        before = transaction.owner.hold()
        self._note_reader()
        return before

    def end_fetch(self, before: asyncio.Task[Any] | None) -> None:
        self._transaction.owner.let_go(before)

    def finish(self) -> None:
        """Its last row was read, or it is being closed."""
        self._is_over = True
        if self._transaction.stream is self:
            self._transaction.stream = None

    def _note_reader(self) -> None:
        task = running_task()
        self._reader: weakref.ref[asyncio.Task[Any]] | None = None if task is None else weakref.ref(task)
        self._greenlet: weakref.ref[greenlet] = weakref.ref(getcurrent())


class StreamedRows(BufferedRowCursorFetchStrategy):
    """SQLAlchemy's way to fetch the rows of a stream; asks the unit before each fetch."""

    __slots__ = ("__weakref__", "_stream")

    def __init__(self, stream: Stream, context: Any) -> None:
        self._stream = stream
        before = stream.begin_fetch()
        try:
            super().__init__(context.cursor, context.execution_options)  # fetches the first row
        finally:
            stream.end_fetch(before)

    def _buffer_rows(self, result: Any, dbapi_cursor: Any) -> None:
        before = self._stream.begin_fetch()
        try:
            super()._buffer_rows(result, dbapi_cursor)
        finally:
            self._stream.end_fetch(before)

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        if size is not None and size <= len(self._rowbuffer):
            return super().fetchmany(result, dbapi_cursor, size)
        before = self._stream.begin_fetch()
        try:
            return super().fetchmany(result, dbapi_cursor, size)
        finally:
            self._stream.end_fetch(before)

    def fetchall(self, result: Any, dbapi_cursor: Any) -> Any:
        before = self._stream.begin_fetch()
        try:
            return super().fetchall(result, dbapi_cursor)
        finally:
            self._stream.end_fetch(before)

    def soft_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._stream.finish()
        super().soft_close(result, dbapi_cursor)

    def hard_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._stream.finish()
        super().hard_close(result, dbapi_cursor)


def open_stream(transaction: Transaction, context: Any) -> StreamedRows:
    """Tell the unit of the stream that a statement has just opened, and return how its rows are fetched."""
    transaction.stream = stream = Stream(transaction, context)
    return stream.rows(context)


def _named(context: Any) -> str:
    """Return what messages call the stream: its tables, not its SQL, which may have values in it."""
    compiled = context.compiled
    froms = [] if compiled is None else getattr(compiled.statement, "columns_clause_froms", [])
    tables = [name for name in (getattr(one, "name", None) for one in froms) if isinstance(name, str)]
    return f"a stream of {', '.join(tables)}" if tables else "a stream"
