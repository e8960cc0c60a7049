"""What each driver has to say of its own connections; one subclass for each, beside its database.

The server tells the driver with each answer where the transaction stands, so no question is sent.  Users and other libraries may
take the driver's own connection; SQLAlchemy does not tell what they send on it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from sqlalchemy.engine import Connection

__all__ = ["OPEN_STATES", "Driver", "Ended", "RawCalls", "State", "cover", "raw_connection", "told"]


class State(enum.Enum):
    """Where the driver says that its transaction stands."""

    NONE = "none"
    OPEN = "open"
    FAILED = "failed"  # PostgreSQL would answer COMMIT by ROLLBACK
    BUSY = "busy"  # with what is still under way


OPEN_STATES = frozenset({State.OPEN, State.FAILED, State.BUSY})


class Ended(enum.Enum):
    """What a statement did to the transaction that it was sent in."""

    ENDED = "it was ended"
    MAYBE = "more statements follow in the same text, whose answers nobody has read yet"
    AUTOCOMMIT = "the connection was switched to autocommit"


class RawCalls(Protocol):
    """Is told of statements on the driver's own connection."""

    def begin_raw(self) -> object: ...

    def raw_failed(self, error: BaseException) -> None: ...

    def raw_sent(self, text: str) -> None: ...

    def end_raw(self, begun: object) -> None: ...


class Driver:
    """One driver.  As it stands, one that nothing is known of: migrations may be run over any.

    Throughout, `raw` is the driver's own connection, and `connection` is SQLAlchemy's.
    """

    name: ClassVar[str] = ""
    bound_to_loop: ClassVar[bool] = False
    """Its connections work in the event loop only in which they were made."""
    can_ask: ClassVar[bool] = False
    """It can `ask` a question outside of SQLAlchemy's transactions."""
    knows_failure: ClassVar[bool] = True
    """It knows of a transaction that has failed, or its database has none; else only the answer to COMMIT tells."""
    says_closed: ClassVar[bool] = True
    """COMMIT on a connection that was closed is an error; else nothing is sent and nothing is said."""
    renews_plans: ClassVar[bool] = False
    """SQLAlchemy itself renews the plans of the whole pool after a migration."""
    warns_of_cursors: ClassVar[bool] = False
    """It warns of a cursor that was left open, also on a lost connection."""
    keeps_cancel_requests: ClassVar[bool] = False
    """`stop` needs something that is to be had only while the connection is well: `keep_cancel_request`."""
    unprepared: ClassVar[dict[str, Any]] = {}
    """The arguments of connect() that switch prepared statements off."""

    # -- the connection

    def is_open(self, raw: Any) -> bool:
        """Say whether the driver still believes in its connection; if not, nothing we send can arrive."""
        return not getattr(raw, "closed", False)

    def version(self, raw: Any) -> str:
        """Return what the server has called its version when it was connected to; nothing where that is not known."""
        info = getattr(raw, "info", None)  # psycopg, psycopg2
        return "" if info is None else str(info.parameter_status("server_version"))

    def session_number(self, raw: Any) -> int | None:
        """Return the server's number of the session, as it was told on connecting; None where that is not known."""
        number: int | None = getattr(getattr(raw, "info", None), "backend_pid", None)  # psycopg2
        return number

    def same_server(self, connection: Connection, other: Connection) -> bool:
        """Say whether a connection leads to the same server as another one, so that numbers of sessions agree."""
        return True

    def set_back(self, lent: Any) -> Callable[[Any], None] | None:
        """Return what sets a pool's connection back to what it is now; None where SQLAlchemy's defaults have to do."""
        return None

    # -- its transaction

    @staticmethod
    def is_idle(raw: Any) -> bool:
        """Say quickly, of nearly every connection that is open, that it is in no transaction and can begin one."""
        return False

    def state(self, raw: Any) -> State | None:
        """Say where the transaction stands; None where the driver cannot tell, or where the connection is gone."""
        return None

    def is_fit(self, raw: Any) -> bool:
        """Say whether the next user of the connection can begin a transaction on it, as far as the driver can tell."""
        return True

    def in_autocommit(self, connection: Any) -> bool:
        """Say whether each statement on a unit's connection commits by itself."""
        return False

    def switched_to_autocommit(self, raw: Any) -> bool:
        """Say whether a connection that was in a unit now commits each statement by itself."""
        return False

    def in_transaction(self, connection: Connection) -> bool:
        """Say whether a transaction is open on a unit's connection, before anything was sent on it here."""
        return self.state(raw_connection(connection)) in OPEN_STATES

    def watch(self, raw: Any) -> Callable[[bool], Ended | None] | None:
        """Return a function that says, after each statement, what that did to the transaction; None where that is not known.

        Its argument is whether the unit has written rows, so that something could be committed without it.
        """
        return None

    def begin_now(self, connection: Connection) -> None:
        """Begin, if SQLAlchemy does so only with its own first statement.

        A statement on the driver's own connection before that one, such as COPY, would be outside the transaction.
        """

    def listen_to_commit(self, connection: Connection) -> Any:
        """Have the answer to the COMMIT that is about to be sent kept; None where the driver does not drop it."""
        return None

    # -- sending

    def send_at_once(self, connection: Any, sql: str) -> None:
        """Send what returns nothing on a unit's connection, in one round trip."""
        connection.exec_driver_sql(sql)

    async def ask(self, raw: Any, question: str) -> Any:
        """Return the one value that answers a question, in one round trip and without a BEGIN, where `can_ask`."""
        raise NotImplementedError

    def tell_raw_calls(self, raw: Any, calls: RawCalls) -> Callable[[], object]:
        """Have statements on the driver's own connection told: that they fail, and that they may have ended the transaction.

        PostgreSQL's drivers know by themselves that a transaction has failed; MariaDB and SQLite undo the statement only.
        No driver knows afterwards that a transaction was ended and the next one begun.

        Args:
            raw: the connection.
            calls: is told.

        Returns:
            a function that ends it.
        """
        return lambda: None

    def tell_next_results(self, raw: Any, failed: Callable[[BaseException], object]) -> Callable[[], object]:
        """Have the failures of further results told, such as a procedure's: SQLAlchemy reads them while it closes the cursor.

        Args:
            raw: the connection.
            failed: is told.

        Returns:
            a function that ends it.
        """
        return lambda: None

    # -- what is cut off, and what fails

    can_stop: ClassVar[bool] = False
    """A statement that was cancelled here can be stopped on the server; see `stop`."""

    def keep_cancel_request(self, connection: Connection) -> None:
        """Keep what `stop` will need, while the connection is well."""

    async def stop(self, raw: Any, connection: Connection, cursor: Any, seconds: float) -> None:
        """Stop what is in flight on a connection that will be discarded, where `can_stop`.

        Args:
            raw: the driver's own connection.
            connection: it was interrupted.
            cursor: what the statement was sent with, None where there was no cursor yet.
            seconds: how long the caller waits.
        """
        raise NotImplementedError

    def break_link(self, raw: Any) -> bool:
        """Break the link under an operation that waits on it, and say whether that was done; other drivers may just be closed."""
        return False

    def explain(self, error: BaseException | None) -> None:
        """Add a note to an error whose remedy is a setting of the driver."""


def raw_connection(connection: Connection) -> Any:
    """Return the driver's own connection without noting that user code has it; see `UnitConnection.connection`."""
    raw = connection.__dict__.get("raw")  # a unit's connection looks it up once
    if raw is not None:
        return raw
    lent: Any = connection._dbapi_connection
    if lent is None:  # lost, or closed
        return None
    return connection.dialect.get_driver_connection(lent.dbapi_connection)


def told(name: str, send: Callable[..., Awaitable[Any]], calls: RawCalls) -> Callable[..., Awaitable[Any]]:
    """Cover a method of the driver's own connection by one that tells what it sends, and that it fails.

    Args:
        name: of the method.
        send: the method.
        calls: is told.
    """

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


def _text(name: str, args: tuple[Any, ...]) -> str:
    """Return the SQL of a call."""
    if name == "begin":
        return name
    at = {"query": 0, "_execute": 1}.get(name)
    text = "" if at is None or len(args) <= at else args[at]
    if isinstance(text, (bytes, bytearray)):
        return text.decode("latin-1")
    return text if isinstance(text, str) else ""


def cover(raw: Any, methods: dict[str, Callable[..., Awaitable[Any]]]) -> Callable[[], object]:
    """Put methods over a connection's own, and return what uncovers those."""
    for name, method in methods.items():
        setattr(raw, name, method)
    return lambda: _uncover(raw, methods)


def _uncover(raw: Any, names: Iterable[str]) -> None:
    for name in names:
        if name in vars(raw):
            delattr(raw, name)
