"""Rows that are fetched as they are read: an operation in flight, until the last of them.

SQLAlchemy tells nobody of a fetch.  Another task's statement under one breaks asyncpg's connection; on MariaDB any other
statement drops the rows that are left, without an error.  So the unit is asked at each fetch, and knows the stream.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy

from sqla_uow._tasks.frames import running_task
from sqla_uow.errors import NoUnitError

if TYPE_CHECKING:
    import asyncio

    from greenlet import greenlet

    from sqla_uow._transaction.transaction import Transaction

__all__ = ["Stream", "open_stream"]


class Stream:
    """The result of a unit whose rows are being read.

    Args:
        unit: whose it is.
        context: of its statement.
    """

    __slots__ = ("_cursor", "_greenlet", "_reader", "_rows", "_unit", "is_over", "name")

    def __init__(self, unit: Transaction, context: Any) -> None:
        self._unit = unit
        self._cursor: Any = context.cursor
        self._rows: weakref.ref[StreamedRows] | None = None
        self.is_over: bool = False
        self.name: str = _named(context)
        self._note_reader()

    def rows(self, context: Any) -> StreamedRows:
        """Return how its rows are fetched.

        It does not keep that alive: of a result that nobody holds any more no row can be missed.
        """
        rows = StreamedRows(self, context)
        self._rows = weakref.ref(rows)
        return rows

    def is_left(self) -> bool:
        """Say whether nobody can read on."""
        return self.is_over or self._rows is None or self._rows() is None

    def is_reading_here(self, family: str) -> bool:
        """Say whether what is sent now belongs to the step that reads the rows, as ``selectinload()`` with them does.

        Not on MariaDB, whose connection has room for one result.
        """
        return family != "mysql" and self._greenlet() is getcurrent()

    def other_reader(self) -> asyncio.Task[Any] | None:
        """Return the task that reads it, if that is another one and goes on."""
        reader = None if self._reader is None else self._reader()
        return None if reader is None or reader.done() or reader is running_task() else reader

    def begin_fetch(self) -> asyncio.Task[Any] | None:
        """Make one operation of a fetch.

        Raises:
            NoUnitError: nothing can be fetched any more.
            TaskBoundaryError: another task uses the unit.
        """
        unit = self._unit
        if self.is_over or not unit.phase.is_open:
            raise NoUnitError(
                f"the rows of {self.name} were read on when its part of {unit.name} had ended; read them to their end inside "
                "it, or read by pages"
            )
        before = unit.owner.hold()
        self._note_reader()
        return before

    def end_fetch(self, before: asyncio.Task[Any] | None) -> None:
        self._unit.owner.let_go(before)

    def finish(self) -> None:
        """Its last row was read, or it was closed; SQLAlchemy closes the cursor."""
        self.is_over = True
        if self._unit.stream is self:
            self._unit.stream = None

    def close(self) -> None:
        """Close the cursor of a stream that was left in the middle; called in SQLAlchemy's greenlet."""
        self.finish()
        self._cursor.close()

    def _note_reader(self) -> None:
        task = running_task()
        self._reader: weakref.ref[asyncio.Task[Any]] | None = None if task is None else weakref.ref(task)
        self._greenlet: weakref.ref[greenlet] = weakref.ref(getcurrent())


class StreamedRows(BufferedRowCursorFetchStrategy):
    """SQLAlchemy's way to fetch the rows of a stream, with the unit asked before each."""

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


def open_stream(unit: Transaction, context: Any) -> StreamedRows:
    """Have the unit know the stream that a statement has just opened, and return how its rows are fetched."""
    unit.stream = stream = Stream(unit, context)
    return stream.rows(context)


def _named(context: Any) -> str:
    """Return what messages call it: the tables, not the SQL, which may have values in it."""
    compiled = context.compiled
    froms = [] if compiled is None else getattr(compiled.statement, "columns_clause_froms", [])
    tables = [name for name in (getattr(one, "name", None) for one in froms) if isinstance(name, str)]
    return f"a stream of {', '.join(tables)}" if tables else "a stream"
