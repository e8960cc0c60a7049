"""What each database has to say of itself; one subclass for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sqla_uow._databases.levels import LEVELS, check_exists

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import Pool

    from sqla_uow._databases.driver import Driver
    from sqla_uow._databases.writer_queue import WriterQueue
    from sqla_uow.typing import IsolationLevel

__all__ = ["Opening", "System"]


class Opening(Protocol):
    """What a transaction that has just begun was asked for, as `System.open` reads it."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def isolation(self) -> IsolationLevel | None:
        """The level; None is the database's default."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether the database is to refuse writes."""
        ...

    @property
    def lock_wait(self) -> float | None:
        """Seconds to wait for a lock, where the database can be told."""
        ...

    @property
    def settings(self) -> Mapping[str, str] | None:
        """What holds in this transaction only, where it `has_settings`."""
        ...

    def seconds_left(self) -> float | None:
        """Return what is left of the deadline, for the server to enforce as well."""
        ...

    def keeps_snapshot(self) -> bool:
        """Say whether the first query decides what all see, so that it should be one of the body's."""
        ...


class System:
    """One database.  As it stands, one that nothing is known of.

    Args:
        name: of its dialect.

    Attributes:
        name: as OpenTelemetry knows it.
        title: as its makers write it, and as messages do.
    """

    family: str = ""
    """Of the three ways to speak to a database, the one that it understands; its own name where it has none of them."""
    levels: ClassVar[tuple[IsolationLevel, ...]] = LEVELS
    """The isolation levels that it has, weakest first."""
    default_level: ClassVar[str | None] = None
    """The level of every transaction, where there is only one."""
    keeps_status: ClassVar[bool] = False
    """It can be asked what became of a transaction."""
    ddl_is_apart: ClassVar[bool] = False
    """DDL is not part of the transaction that it is sent in."""
    ddl_commits: ClassVar[bool] = False
    """DDL, and what else is in `implicit_commit`, first commits what is open."""
    fails_whole: ClassVar[bool] = False
    """A statement that fails ends the transaction, unless a savepoint brings it back."""
    limits_statements: ClassVar[bool] = False
    """Each statement can carry the deadline; see `limit`."""
    limits_lock_wait: ClassVar[bool] = False
    """A transaction can be told how long to wait for a lock."""
    begins_by_sql: ClassVar[bool] = False
    """Its transactions begin with a BEGIN that is sent as a statement."""
    lends_open: ClassVar[bool] = False
    """Its pool may lend a connection that is in a transaction: programs have the driver begin at once."""
    queues_writers: ClassVar[bool] = False
    """It has room for one writer; see `writer_queue`."""
    updates_two_tables: ClassVar[bool] = False
    """One UPDATE can change the rows of two tables."""
    writes_in_with: ClassVar[bool] = False
    """A statement can change further rows in its WITH."""
    sets_back: ClassVar[bool] = False
    """What `open` sets stays on the connection until `restore` is called."""
    one_result: ClassVar[bool] = False
    """A connection has room for one result: another statement cuts off the rows that are still to be read."""
    replaces_levels: ClassVar[bool] = False
    """It may accept a level and run another; see `check_honoured`."""
    has_positions: ClassVar[bool] = False
    """It can say how far a replica must be; see `primary_position`."""
    has_settings: ClassVar[bool] = False
    """A transaction can have settings of the application; its policies read them."""
    has_xmin: ClassVar[bool] = False
    """Each row says which transaction wrote it."""
    primary_position: ClassVar[str] = ""
    """The question to a primary: how far has it written?"""
    replica_position: ClassVar[str] = ""
    """The question to a replica: how far has it replayed?  It answers nothing once it is a primary itself."""
    blockers: ClassVar[tuple[str, ...]] = ()
    """Queries, to be tried in turn, for the one of the sessions {outer} for which the session {inner} waits."""
    stop_session: ClassVar[str] = ""
    """The statement that ends what the session {inner} runs."""
    quoted: ClassVar[re.Pattern[str] | None] = None
    """What in a text of SQL is a string, a name or a comment; None where such texts are not read."""
    harmless_inside: ClassVar[tuple[str, ...]] = ()
    """How statements begin that begin a transaction, and that are refused or do nothing inside one."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.family: str = self.family or name
        self.title: str = name

    def is_kin_to(self, other: System) -> bool:
        """Say whether one may replicate the other: both are of one family, or the same."""
        return self.family == other.family

    def check_level(self, isolation: object, *, who: str) -> None:
        """Refuse a level that does not exist, or that this database does not have.

        Args:
            isolation: what was asked for.
            who: the function that asks, for the message.

        Raises:
            ValueError: with what would be right.
        """
        check_exists(isolation, who=who)
        if isolation is not None and isolation not in self.levels:
            offered = " or ".join(map(repr, self.levels))
            raise ValueError(f"{who} asks for isolation {isolation!r}, which {self.name} does not have; use {offered}")

    def check_honoured(self, connection: Connection, isolation: IsolationLevel, *, who: str) -> None:
        """Refuse a level that the server has accepted and replaced by another, where it `replaces_levels`.

        Args:
            connection: of a transaction that was begun at the level, nothing sent yet.
            isolation: what was asked for.
            who: the function that asks, for the message.

        Raises:
            ValueError: with what would be right.
        """

    def check_settings(self, *, who: str) -> None:
        """Refuse settings and roles where there are none.

        Args:
            who: has some, for the message.

        Raises:
            ValueError: with what would be right.
        """
        if not self.has_settings:
            raise ValueError(
                f"{who} has settings or a role, which transactions of {self.title} do not have; leave them out, or send what there "
                "is in on_begin"
            )

    def recognise(self, connection: Connection, driver: Driver) -> System:
        """Return which database it really is, now that there is a connection; nothing is sent."""
        return self

    def engine_options(self, isolation: IsolationLevel | None, *, read_only: bool) -> dict[str, Any]:
        """Return the execution options that have SQLAlchemy begin so, where that costs no round trip."""
        return {} if isolation is None else {"isolation_level": isolation}

    def open(self, connection: Any, driver: Driver, unit: Opening) -> None:
        """Send what a transaction needs before its first statement.

        Args:
            connection: just begun, nothing sent yet.
            driver: of the connection.
            unit: what it was begun for.
        """

    def limit(self, statement: str, seconds: float) -> str:
        """Give a statement what is left of the deadline, where `limits_statements`."""
        return statement

    def lift_lock_wait(self, connection: Connection) -> None:
        """Let the transaction wait for locks as long as its connection does by itself, where `limits_lock_wait`."""

    @staticmethod
    def restore(dbapi_connection: Any, info: dict[Any, Any]) -> None:
        """Undo what `open` has set on a connection, before the next user gets it, where `sets_back`."""

    def writer_queue(self, pool: Pool) -> WriterQueue:
        """Return where the writers of a pool wait for their turn, where it `queues_writers`."""
        raise NotImplementedError

    def read_position(self, answer: str) -> Mapping[int, int]:
        """Read what `primary_position` and `replica_position` are answered, where `has_positions`."""
        raise NotImplementedError

    async def may_lose_locks(self, connection: AsyncConnection) -> bool:
        """Say whether a row that a transaction has written may be free before the transaction is over."""
        return False
