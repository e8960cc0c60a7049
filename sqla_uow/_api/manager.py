"""`UnitOfWorkManager`: an engine, and how units over it are begun, joined and retried."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, get_args, overload

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import TypeVar

from sqla_uow._attempts.attempt import Attempt
from sqla_uow._attempts.call import Call
from sqla_uow._attempts.loop import LoopedCall
from sqla_uow._attempts.observers import check_observers
from sqla_uow._databases.database import drivers_that_ask
from sqla_uow._replicas.position import from_text
from sqla_uow._replicas.router import LastWrite, ReplicaRouter
from sqla_uow._retry.groups import FREE, together
from sqla_uow._retry.policy import RetryPolicy
from sqla_uow._scope.lookup import last_write_of, locate
from sqla_uow._scope.places import ManagerPlace
from sqla_uow._scope.scope import ScopeContext
from sqla_uow._session.maker import SessionMaker
from sqla_uow._settings.sources import Sources, layer_of
from sqla_uow._tasks.frames import pop, push
from sqla_uow._unit.join import Joined, Nested, join, joinable
from sqla_uow._unit.options import Options, block_options, check_name, check_policy, check_retries, check_timeout
from sqla_uow._unit.setup import Setup
from sqla_uow._unit.verify import Verifier
from sqla_uow.typing import ContentionGroup, LazyLoads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from types import TracebackType

    from sqla_uow._databases.database import Database
    from sqla_uow._scope.scope import Scope
    from sqla_uow._unit.unit import UnitOfWork
    from sqla_uow.events import Observer
    from sqla_uow.typing import Contention, IsolationLevel, Propagation, Settings, SettingSource, Statistics

__all__ = ["ActivePlace", "UnitOfWorkManager", "setup_of"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)

_ON_AMBIGUOUS = Literal["raise", "verify"]


class UnitOfWorkManager(Generic[S]):
    """Begins units of work over one engine.  Immutable; make it once, beside the engine, and activate it.

    Args:
        bind: an `AsyncEngine`, or an `async_sessionmaker` bound to one (then units have its class of session).
        name: `using=` finds the manager by this name.
        isolation: the level of units that do not ask for one; None leaves it to the database.
        retries: how often a transactional function is run again after a retryable failure, if the function does not
            say; 0 means a single run.
        timeout: seconds that all attempts and waits of one call may take together; None sets no deadline.
        retry: how long to wait between attempts.
        replicas: engines of replicas of the database.  Units that only read run there, unless they are SERIALIZABLE; a
            client never reads a state older than its own writes.
        replica_wait: seconds that a read waits for a replica to replay what its client has written; then it goes to the
            primary.
        ambiguous_commit: ``"raise"`` gives `AmbiguousCommitError` when the answer to a COMMIT is lost; ``"verify"`` asks
            the database what became of it, and costs one round trip in every unit that writes.
        observers: objects that are told of each run, retry and outcome; see `sqla_uow.events`.
        lazy_loads: what happens when a relationship or a deferred column is loaded at its first use, object by object.
            ``"warn"`` gives an `NPlusOneWarning` when a unit sends the same SELECT more than ten times, lazily or not;
            ``"raise"`` warns as well, and refuses each lazy load with a `LazyLoadError`.
        settings: what every transaction is told before its first statement, on PostgreSQL: names with a dot, and their
            values, for row level security or a trigger to read.  A value is a string, or a function without arguments,
            which is called once for each attempt when the unit is opened.  They end with the transaction.
        optional_settings: names of settings that may be missing; they are the empty string then.  Without a value for
            each other one, no transaction begins: `SettingMissingError`.
        role: the role that every transaction takes on, on PostgreSQL; a string, or a function as above.
        on_begin: an ``async def`` function that is called with the unit of each attempt when its transaction begins,
            after the settings and before the first statement of the body; also for read sessions and on replicas.  What
            it raises is the attempt's error.

    Raises:
        TypeError, ValueError: an argument cannot work, such as an isolation level that this database does not have; the
            message says what would work.
    """

    def __init__(
        self,
        bind: AsyncEngine | async_sessionmaker[S],
        /,
        *,
        name: str = "default",
        isolation: IsolationLevel | None = None,
        retries: int = 0,
        timeout: float | None = None,
        retry: RetryPolicy = RetryPolicy(),
        ambiguous_commit: Literal["raise", "verify"] = "raise",
        replicas: Sequence[AsyncEngine] = (),
        replica_wait: float = 0.05,
        observers: Sequence[Observer] = (),
        lazy_loads: LazyLoads = "allow",
        settings: Settings | None = None,
        optional_settings: Sequence[str] = (),
        role: SettingSource | None = None,
        on_begin: Callable[[UnitOfWork[S]], Awaitable[object]] | None = None,
    ) -> None:
        who = f"UnitOfWorkManager {name!r}"
        check_name(name, "UnitOfWorkManager(name=...)")
        check_retries(retries, who, optional=False)
        check_timeout(timeout, who)
        check_policy(retry, who, optional=False)
        if ambiguous_commit not in get_args(_ON_AMBIGUOUS):
            raise ValueError(
                f"{who} has ambiguous_commit={ambiguous_commit!r}, which is unknown; use 'raise' or 'verify'"
            )
        if lazy_loads not in get_args(LazyLoads):
            raise ValueError(f"{who} has lazy_loads={lazy_loads!r}, which is unknown; use 'allow', 'warn' or 'raise'")
        maker = SessionMaker(bind, lazy_loads)
        maker.database.system.check_level(isolation, who=who)
        sources = Sources.of(settings, optional_settings, role, on_begin, who)
        if sources is not None and sources.tells:
            maker.database.system.check_settings(who=who)
        self._replicas = _engines(replicas, replica_wait, who)
        self._lazy_loads: LazyLoads = lazy_loads
        self._setup: Setup[S] = Setup(
            name,
            maker,
            isolation=isolation,
            retries=retries,
            timeout=timeout,
            retry=retry,
            replicas=_router_of(maker.database, self._replicas, replica_wait, who) if self._replicas else None,
            verifier=Verifier(maker.database) if ambiguous_commit == "verify" else None,
            observers=check_observers(observers, who),
            sources=sources,
        )

    @property
    def name(self) -> str:
        """The name by which `using=` finds the manager."""
        return self._setup.name

    @property
    def engine(self) -> AsyncEngine:
        """The engine that was passed, or that the sessionmaker is bound to."""
        return self._setup.database.engine

    @property
    def replicas(self) -> tuple[AsyncEngine, ...]:
        """The engines of replicas that were passed."""
        return self._replicas

    @property
    def isolation(self) -> IsolationLevel | None:
        """The level of units that do not ask for one."""
        return self._setup.isolation

    @property
    def retries(self) -> int:
        """How often a function is run again if it does not say so itself."""
        return self._setup.retries

    @property
    def timeout(self) -> float | None:
        """The seconds that a call may take if it does not say so itself; None sets no deadline."""
        return self._setup.timeout

    @property
    def retry(self) -> RetryPolicy:
        """How long to wait between attempts."""
        return self._setup.retry

    @property
    def lazy_loads(self) -> LazyLoads:
        """What happens to lazy loads in its units."""
        return self._lazy_loads

    def activate(self) -> AbstractContextManager[Self]:
        """Make this the current manager of its name in the ``with`` block, and in tasks that are started there."""
        return _Activation(self)

    def scope(
        self,
        *,
        position: str | None = None,
        observers: Sequence[Observer] = (),
        settings: Settings | Callable[[], Settings] | None = None,
        role: SettingSource | None = None,
    ) -> AbstractAsyncContextManager[Scope]:
        """Open a scope: in the ``async with`` block `current_session()` is a read session outside any unit.

        Args:
            position: with replicas, how far the client of this scope has written: what `Scope.position` said, or "" if
                that is not known.  The scope is then a client of its own; with None it goes on with the client around
                it.
            observers: objects that are told of the calls in this scope, after the observers of the manager.
            settings: those of the read session, and of all units of this manager that are begun in the scope; they lie
                over the manager's, name by name.  A function that returns them is called whenever a unit is opened.
            role: likewise.
        """
        setup = self._setup
        last_write = None
        if setup.replicas is not None:
            last_write = last_write_of(setup) if position is None else LastWrite(from_text(position))
        sources = setup.sources
        if settings is not None or role is not None:
            setup.database.system.check_settings(who="scope()")
            sources = (sources or Sources()).under(layer_of(settings, role, "scope()"), "scope()")
        told = check_observers(observers, "scope()") if observers else ()
        return ScopeContext(self, setup, last_write, told, sources)

    def begin(
        self,
        *,
        isolation: IsolationLevel | None = None,
        read_only: bool = False,
        propagation: Propagation = "required",
        timeout: float | None = None,
        settings: Settings | None = None,
        role: SettingSource | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S]]:
        """Return a block that is one unit: committed at its end, rolled back when an exception leaves it.

        A block cannot be run again, so nothing is retried: a retryable failure raises `ConflictError` at once.

        Args:
            isolation: the level; None is the manager's.
            read_only: refuse writes, in the database as well.
            propagation: what to do when a unit is open already; see `transactional`.
            timeout: seconds for the block; None is the manager's.
            settings: those of this unit, over the manager's, name by name; None as a value says that there is none.
            role: the role of this unit; None is the manager's.
        """
        options = block_options(
            who="begin()", isolation=isolation, read_only=read_only, propagation=propagation, retries=0, timeout=timeout
        )
        self._setup.database.system.check_level(isolation, who=options.who)
        if settings is not None or role is not None:
            options = options.telling(layer_of(settings, role, options.who))
        return self._enter(options)

    def attempts(
        self,
        *,
        retries: int,
        isolation: IsolationLevel | None = None,
        read_only: bool = False,
        timeout: float | None = None,
        retry_on: Callable[[BaseException], bool] | None = None,
        name: str | Callable[[], str] | None = None,
        settings: Settings | Callable[[], Settings] | None = None,
        role: SettingSource | None = None,
    ) -> AsyncIterator[AbstractAsyncContextManager[UnitOfWork[S]]]:
        """Return the attempts of a block that can be run again.

        ::

            async for attempt in manager.attempts(retries=5):
                async with attempt as unit:
                    ...

        Each attempt begins a unit of its own.  Until the last attempt, the block swallows a retryable failure.
        ``break`` and ``return`` in the block commit.  If that COMMIT meets a conflict, `ConflictError` is raised at
        once, because the loop is left and nobody would run the block again.  The same happens if the block is in
        another function than the loop.  Code that follows the block inside the loop runs after a failed attempt too.

        Args:
            retries: how often the block may be run again.
            isolation: the level; None is the manager's.
            read_only: refuse writes, in the database as well.
            timeout: seconds over all attempts and waits; None is the manager's.
            retry_on: see `transactional`.
            name: the name that errors, the log, observers and statistics use instead of ``attempts()``.  A function is
                called whenever the name is needed, so that it can use what is known by then.
            settings: those of these units, over the manager's, name by name; a function that returns them is called for
                each attempt.
            role: likewise.
        """
        who = name if isinstance(name, str) else "attempts()"
        options = block_options(
            who=who, isolation=isolation, read_only=read_only, retries=retries, timeout=timeout, retry_on=retry_on
        )
        self._setup.database.system.check_level(isolation, who=options.who)
        if name is not None and not isinstance(name, str):
            options = options.named(name)
        if settings is not None or role is not None:
            options = options.telling(layer_of(settings, role, options.who))
        return LoopedCall(self._setup, options, sys._getframe(1).f_code)

    @overload
    def contention(self, /) -> tuple[ContentionGroup, ...]: ...

    @overload
    def contention(self, function: Callable[..., object] | str, /) -> Contention: ...

    def contention(
        self, function: Callable[..., object] | str | None = None, /
    ) -> Contention | tuple[ContentionGroup, ...]:
        """Return which functions get in each other's way, and how many of their calls wait because of that.

        Args:
            function: one that `transactional` has decorated, one with an `attempts` loop in it, or the name of a route, such
                as ``"POST /transfers"``, where the request is the transaction.

        Returns:
            the state of the group that the function takes turns with; without a function, all groups.
        """
        everywhere = self._setup.groups.everywhere()
        if function is None:
            return tuple(
                ContentionGroup(group.names(), tuple(sorted(group.tables)), group.gate.state())
                for groups in everywhere
                for group in list(groups.hot)
            )
        key = getattr(function, "__transactional__", None) or getattr(function, "__code__", None) or function
        members = [member for groups in everywhere if (member := groups.known(key)) is not None]
        states = [group.gate.state() for member in members if (group := member.group) is not None]
        return together(states) if states else FREE

    def statistics(self) -> Statistics:
        """Return what has happened to the calls of this manager since it was made, and its pool and turns now.

        The result is a snapshot: the difference between two of them is what happened in between.  Calls in all threads
        count.
        """
        contention = [(", ".join(group.functions), group.state) for group in self.contention()]
        database = self._setup.database
        return self._setup.counts.snapshot(database.pool, database.capacity(), contention)

    def _enter(self, options: Options) -> Attempt[S] | Joined[S] | Nested[S]:
        """Return what `options.propagation` means here: a new unit, a joined one, or a savepoint."""
        setup, open_unit = locate(self._setup, options.who)
        unit = joinable(open_unit, options, setup.name)
        return Attempt(Call(setup, options)) if unit is None else join(unit, options)

    def _over(self, engine: AsyncEngine) -> UnitOfWorkManager[S]:
        """Return a manager like this one over another engine; its calls are counted by this one."""
        setup = self._setup
        manager = UnitOfWorkManager(
            setup.maker.over(engine),
            name=setup.name,
            isolation=setup.isolation,
            retries=setup.retries,
            timeout=setup.timeout,
            retry=setup.retry,
            ambiguous_commit="raise" if setup.verifier is None else "verify",
            observers=setup.observers,
            lazy_loads=self._lazy_loads,
        )
        manager._setup.counts = setup.counts
        manager._setup.sources = setup.sources
        return manager

    def __repr__(self) -> str:
        # Not the engine: its repr has the URL.
        return f"<UnitOfWorkManager {self.name!r} on {self._setup.database.system.name}>"


def setup_of(manager: UnitOfWorkManager[S]) -> Setup[S]:
    """Return what the units of a manager share."""
    return manager._setup


def _engines(replicas: Iterable[AsyncEngine], wait: float, who: str) -> tuple[AsyncEngine, ...]:
    """Return the engines of replicas, for good."""
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait < math.inf:
        raise ValueError(f"{who} has replica_wait={wait!r}; use a number of seconds, 0 or more")
    if not isinstance(replicas, Iterable):
        raise TypeError(f"{who} has replicas of type {type(replicas).__name__}; pass a list of engines")
    engines = tuple(replicas)
    for engine in engines:
        if not isinstance(engine, AsyncEngine):
            raise TypeError(
                f"{who} has a replica of type {type(engine).__name__}; pass engines of create_async_engine()"
            )
    return engines


def _router_of(primary: Database, engines: tuple[AsyncEngine, ...], wait: float, who: str) -> ReplicaRouter:
    databases = [SessionMaker(engine).database for engine in engines]
    for database in [primary, *databases]:
        if not database.system.is_kin_to(primary.system):
            raise ValueError(
                f"{who} is on {primary.system.name}, and a replica of it on {database.system.name}; pass its own replicas"
            )
        if not database.driver.can_ask:
            raise ValueError(
                f"{who} has replicas over {database.sync_engine.dialect.driver}, which cannot report a replication position; use {', '.join(drivers_that_ask())}"
            )
        if not database.system.has_positions:
            raise ValueError(
                f"{who} has replicas on {database.system.title}, which has no replication position to wait for; "
                "drop replicas=, and use AS OF SYSTEM TIME for reads that may be stale"
            )
    return ReplicaRouter(primary, databases, wait)


class ActivePlace(ManagerPlace):
    """A manager is activated here."""

    __slots__ = ("manager",)

    def __init__(self, manager: UnitOfWorkManager[Any]) -> None:
        super().__init__(setup_of(manager))
        self.manager: UnitOfWorkManager[Any] = manager


class _Activation:
    """``with manager.activate()``; every entry is a place of its own, so that it can be nested and reused."""

    __slots__ = ("_manager", "_places")

    def __init__(self, manager: UnitOfWorkManager[Any]) -> None:
        self._manager = manager
        self._places: list[ManagerPlace] = []

    def __enter__(self) -> Any:
        place = ActivePlace(self._manager)
        self._places.append(place)
        push(place)
        return self._manager

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pop(self._places.pop())
