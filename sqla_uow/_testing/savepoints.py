"""Transactions that are savepoints of one outer transaction: what `rolled_back` puts between SQLAlchemy and the driver.

In the dialect, so that everything above it goes on as in production: the unit's phases, the events of SQLAlchemy, how
errors are understood.  Only what is sent differs: SAVEPOINT for BEGIN, RELEASE for COMMIT, ROLLBACK TO for ROLLBACK.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any, cast

from sqla_uow._databases.failures import code_of
from sqla_uow._databases.levels import is_weaker_or_same
from sqla_uow.errors import IsolationConflictError, PropagationError, TaskBoundaryError

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.engine import Dialect

__all__ = ["Outer", "check_loop", "dialect_within"]

_NAME = "uow_unit"
_ENDING = {1213, 1020}
_TIMEOUTS = ("statement_timeout", "lock_timeout", "transaction_timeout")
_OPENING = re.compile(r"\s*SET\s+TRANSACTION\b", re.IGNORECASE)
_BEGIN = re.compile(r"\s*BEGIN\b", re.IGNORECASE)
_TELLS = re.compile(r"SELECT set_config\(")
_TOLD = re.compile(r"set_config\('(role|[a-z_][\w$]*(?:\.[a-z_][\w$]*)+)'")
_LEVEL = re.compile(r"ISOLATION\s+LEVEL\s+([A-Z]+(?:\s+[A-Z]+)?)", re.IGNORECASE)
_WRITES = re.compile(r"\s*(?:INSERT|UPDATE|DELETE|REPLACE)\b", re.IGNORECASE)
# What MariaDB itself answers in a READ ONLY transaction; a savepoint cannot be one.
_REFUSE = "SIGNAL SQLSTATE '25006' SET MYSQL_ERRNO = 1792, MESSAGE_TEXT = 'Cannot execute statement in a READ ONLY transaction'"


class Outer:
    """One driver connection in a transaction that will be rolled back, and the savepoint that is open in it.

    Args:
        connection: SQLAlchemy's adapter of the driver's connection, in a transaction.
        family: see `family_of`.
        level: the isolation level of the transaction.
    """

    def __init__(self, connection: Any, family: str, level: str) -> None:
        self.connection = connection
        self.family = family
        self.level = level
        self.is_over = False
        self.read_only = False
        self._open = False
        self._lost: BaseException | None = None
        self._ended_by: int | None = None
        self._at_commit = self._checks() if family == "postgresql" else None
        self._told: set[str] = set()  # the names of settings

    def is_of(self, dbapi_connection: Any) -> bool:
        """Say whether this, which may be the pool's proxy of it, is the connection."""
        return getattr(dbapi_connection, "dbapi_connection", dbapi_connection) is self.connection

    @property
    def is_lost(self) -> bool:
        """Whether the transaction was found to be gone."""
        return self._lost is not None

    def lend(self) -> Any:
        """Return the connection to the pool, after it was discarded as well: the savepoint then goes as the server would."""
        self.check()
        return self.connection

    def check(self) -> None:
        """Refuse what would really be committed, and what the driver would refuse in words of its own.

        Raises:
            PropagationError: the transaction has ended, or has been lost.
            TaskBoundaryError: this is another event loop, to which the driver's connection does not belong.
        """
        check_loop(self.connection.driver_connection, "rolled_back() has begun in another event loop")
        if self.is_over:
            raise PropagationError("rolled_back() has ended, and its engine with it; use the engine inside the block")
        if self._open:
            with contextlib.suppress(Exception):
                self.undo()
        if self._ended_by is not None:
            raise PropagationError(
                f"MariaDB has ended the transaction of rolled_back() by {self._ended_by}, a deadlock with another connection, and "
                "with it what the test wrote; where tests run side by side, as with pytest-xdist, give each worker a database "
                "of its own"
            ) from self._lost
        if self._lost is not None:
            raise PropagationError(
                f"the transaction of rolled_back() is gone ({type(self._lost).__name__}), and with it what the test wrote; "
                "use a database of its own for a test that cancels statements, loses the connection or sends DDL on MariaDB"
            ) from self._lost

    def note(self, error: BaseException) -> None:
        """Remember an error by which MariaDB ends all of a transaction, savepoints or not."""
        if self.family == "mariadb" and (code := code_of(error)) in _ENDING:
            self._ended_by, self._lost = int(code), error

    def begin(self) -> None:
        self.check()
        self._send_or_lose(f"SAVEPOINT {_NAME}")
        self._open = True
        if self.read_only and self.family == "postgresql":
            self._send("SET TRANSACTION READ ONLY")  # until the end of the savepoint, whatever that end is

    def release(self) -> None:
        """Do what COMMIT does, except that nothing is made durable."""
        if self._at_commit is not None:
            self._send(self._at_commit)
        self._send_or_lose(f"RELEASE SAVEPOINT {_NAME}")
        self._end()
        if self._told:
            told, self._told = self._told, set()
            for name in sorted(told):
                parts = ".".join(f'"{part}"' for part in name.split("."))  # some are words of SQL, such as "user"
                self._send(f"SET LOCAL {parts} TO DEFAULT")

    def note_settings(self, statement: str) -> None:
        """Remember what a unit was told: RELEASE does not end it."""
        self._told.update(_TOLD.findall(statement))

    def undo(self) -> None:
        """Do what ROLLBACK does."""
        if not self._open:
            return
        self._told.clear()
        self._end()
        self._send_or_lose(f"ROLLBACK TO SAVEPOINT {_NAME}")
        self._send(f"RELEASE SAVEPOINT {_NAME}")

    def _end(self) -> None:
        self._open = False
        if self.family == "mariadb":  # told by SET TRANSACTION, which holds for one
            self.read_only = False

    def check_level(self, level: str) -> None:
        """Refuse a level that a unit would have in production, and does not have here.

        Raises:
            IsolationConflictError: with the cure.
        """
        if not is_weaker_or_same(level, self.level):
            raise IsolationConflictError(
                f"a unit needs {level.replace('_', ' ')} but rolled_back() has begun at {self.level}; "
                f"use rolled_back(..., isolation={level.replace('_', ' ')!r})"
            )

    def replaces(self, cursor: Any, statement: str) -> bool:
        """Say whether a statement is for the beginning of a transaction, and done with here."""
        if self.family == "sqlite":
            return _BEGIN.match(statement) is not None
        if self.family != "mariadb":
            return False
        if _OPENING.match(statement) is None:
            if self.read_only and _WRITES.match(statement) is not None:
                cursor.execute(_REFUSE)
            return False
        if (level := _LEVEL.search(statement)) is not None:
            self.check_level(level[1].upper())
        self.read_only = "READ ONLY" in statement.upper()
        return True

    def _checks(self) -> str:
        """Return what PostgreSQL does at COMMIT and not at RELEASE: check deferred constraints, end SET LOCAL."""
        ask = ", ".join(f"current_setting('{name}', true)" for name in _TIMEOUTS)
        cursor = self.connection.cursor()
        cursor.execute(f"SELECT {ask}")
        values = cursor.fetchone()
        cursor.close()
        known = [(name, value) for name, value in zip(_TIMEOUTS, values, strict=True) if value is not None]
        restore = " ".join(f"PERFORM set_config('{name}', '{value}', true);" for name, value in known)
        # The inner block is a subtransaction that ends by an error of ours: it leaves the constraints as deferred as before.
        return (
            "DO $$ BEGIN BEGIN SET CONSTRAINTS ALL IMMEDIATE; RAISE SQLSTATE 'UOW00'; "
            f"EXCEPTION WHEN SQLSTATE 'UOW00' THEN NULL; END; {restore} END $$"
        )

    def _send_or_lose(self, statement: str) -> None:
        try:
            self._send(statement)
        except BaseException as error:
            self._lost = error
            raise

    def _send(self, statement: str) -> None:
        cursor = self.connection.cursor()
        try:
            cursor.execute(statement)
        finally:
            cursor.close()


class _Within:
    """What a dialect does otherwise on the outer transaction's connection; on every other one it does what it did."""

    outer: Outer

    def do_begin(self, dbapi_connection: Any) -> None:
        if self.outer.is_of(dbapi_connection):
            self.outer.begin()
        else:
            self._above.do_begin(dbapi_connection)

    def do_commit(self, dbapi_connection: Any) -> None:
        if self.outer.is_of(dbapi_connection):
            self.outer.release()
        else:
            self._above.do_commit(dbapi_connection)

    def do_rollback(self, dbapi_connection: Any) -> None:
        if self.outer.is_of(dbapi_connection):
            self.outer.undo()
        else:
            self._above.do_rollback(dbapi_connection)

    # Asked by the pool of the outer transaction's connection only.  The next one that takes it undoes what was open.

    def do_close(self, dbapi_connection: Any) -> None:
        pass

    def do_terminate(self, dbapi_connection: Any) -> None:
        pass

    def set_isolation_level(self, dbapi_connection: Any, level: str) -> None:
        if self.outer.is_of(dbapi_connection):
            self.outer.check_level(level)
        else:
            self._above.set_isolation_level(dbapi_connection, level)

    def reset_isolation_level(self, dbapi_connection: Any) -> None:
        if not self.outer.is_of(dbapi_connection):
            self._above.reset_isolation_level(dbapi_connection)

    def set_readonly(self, dbapi_connection: Any, value: bool) -> None:  # noqa: FBT001  # SQLAlchemy's signature
        if self.outer.is_of(dbapi_connection):
            self.outer.read_only = value
        else:
            self._above.set_readonly(dbapi_connection, value)

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        if not self.outer.replaces(cursor, statement):
            if _TELLS.match(statement) is not None:
                self.outer.note_settings(statement)
            with self._noting():
                self._above.do_execute(cursor, statement, parameters, context)

    def do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        with self._noting():
            self._above.do_executemany(cursor, statement, parameters, context)

    @contextlib.contextmanager
    def _noting(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self.outer.note(error)
            raise

    @property
    def _above(self) -> Any:
        return super()


def check_loop(driver_connection: Any, fact: str) -> None:
    """Refuse a connection that its driver has bound to another event loop than this one; asyncpg, asyncmy, aiomysql do.

    Args:
        driver_connection: the driver's own.
        fact: what has happened, for the message.

    Raises:
        TaskBoundaryError: with the cure.
    """
    loop = getattr(driver_connection, "_loop", None)
    if loop is not None and loop is not asyncio.get_running_loop():
        raise TaskBoundaryError(
            f"{fact}; use httpx.AsyncClient with ASGITransport(app) instead of the sync TestClient, one loop_scope for fixtures "
            "and tests, and poolclass=NullPool for an engine that outlives a test"
        )


def dialect_within(dialect: Dialect, outer: Outer) -> Dialect:
    """Return a copy of a dialect that has used a connection, whose transactions are savepoints of `outer`."""
    cls: Any = type(
        f"{type(dialect).__name__}Within",
        (_Within, type(dialect)),
        {"supports_statement_cache": dialect.supports_statement_cache},
    )
    within: Any = cls.__new__(cls)
    within.__dict__.update(dialect.__dict__)
    within.__dict__.pop("dispatch", None)  # its own: a plain copy would share the listeners
    within.dispatch._update(dialect.dispatch, only_propagate=False)
    within.outer = outer
    return cast("Dialect", within)
