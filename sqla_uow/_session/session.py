"""The session of a unit, and its events.

`UnitSession` overrides public methods of `Session` and six private ones.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from greenlet import getcurrent
from sqlalchemy import event
from sqlalchemy.exc import MissingGreenlet, StatementError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.util import await_only

from sqla_uow._databases.failures import classify
from sqla_uow._databases.self_wait import watch_locks
from sqla_uow._log import log
from sqla_uow._session.connection import UnitConnection
from sqla_uow._session.connection_events import lift
from sqla_uow._session.engine import UnitEngine
from sqla_uow._session.instances import check_attach, check_merge, describe
from sqla_uow._session.load_advice import NO_WAITING, refusal
from sqla_uow._session.load_origin import UNASKED, origin_of
from sqla_uow._session.savepoint import UnitSavepoint
from sqla_uow._transaction.committing import before_commit, being_committed
from sqla_uow._transaction.failing import begin_again, can_begin_again
from sqla_uow._transaction.phase import Phase
from sqla_uow._transaction.reports import session_rolled_back, transaction_begun
from sqla_uow.errors import PropagationError, ReadOnlyError, UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import InstanceState

    from sqla_uow._replicas.router import LastWrite
    from sqla_uow._settings.preamble import Preamble
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow.typing import IsolationLevel

__all__ = ["UnitSession", "has_changes", "refuse_changes", "unit_session_class", "wait_for_locks"]


class UnitSession(Session):
    """The `Session` of a unit: asks the unit before it sends SQL, and leaves COMMIT and close to it."""

    transaction_of_unit: Transaction | None = None
    on_dml: ClassVar[Callable[..., Any] | None] = None
    """What `mixins` does to INSERT, UPDATE and DELETE: `sqla_uow._versions.bulk`."""
    on_expire: ClassVar[Callable[..., None] | None] = None
    """What `mixins` does before attributes are expired; see `sqla_uow._versions.reading`, and for the next."""
    on_refresh: ClassVar[Callable[..., Iterable[str] | None] | None] = None
    on_merge: ClassVar[Callable[..., Any] | None] = None
    """What `mixins` does around `merge`; see `sqla_uow._versions.events`."""

    def _execute_internal(self, statement: Any, params: Any = None, **options: Any) -> Any:
        # execute(), scalars() and scalar() all call this.  A do_orm_execute listener would make each SELECT slower.
        if getattr(statement, "is_dml", False):
            return self._execute_dml(super()._execute_internal, statement, params, options)
        try:
            return super()._execute_internal(statement, params, **options)
        except (MissingGreenlet, StatementError, OSError) as error:
            if self._begins_again(error):
                return self._execute_internal(statement, params, **options)
            missing = error.orig if isinstance(error, StatementError) else error  # 2.1 wraps it, 2.0 does not
            origin = origin_of(sys._getframe(1)) if isinstance(missing, MissingGreenlet) else None
            if origin is None or origin.cause not in UNASKED:
                raise
            raise refusal(origin, NO_WAITING) from missing

    def _execute_dml(self, run: Callable[..., Any], statement: Any, params: Any, options: dict[str, Any]) -> Any:
        try:
            if self.on_dml is None:
                return run(statement, params, **options)
            return self.on_dml(self, run, statement, params, options)
        except StaleDataError as error:
            self._is_stale(error)
            raise

    def _is_stale(self, error: StaleDataError) -> None:
        """Treat an error outside a flush as one inside: it dooms the unit, and is retried."""
        transaction = self.transaction_of_unit
        if transaction is not None:
            transaction.stale = classify(error)
            transaction.doom.mark(error, failure=transaction.stale)

    def _get_impl(self, *args: Any, **kwargs: Any) -> Any:
        # get() with a lock compares the version in memory.
        try:
            return super()._get_impl(*args, **kwargs)
        except StaleDataError as error:
            self._is_stale(error)
            raise

    def _begins_again(self, error: Exception) -> bool:
        """Say whether the first statement of a read session must be sent again, as its connection was dead."""
        transaction = self.transaction_of_unit
        if transaction is None or not can_begin_again(transaction) or has_changes(self) or len(self.identity_map):
            return False
        transaction.end_here(Phase.ENDING)
        super().rollback()
        begin_again(transaction)
        log(
            logging.INFO, "%s met a dead connection (%s) and begins again on another", transaction.name, type(error).__name__,
            function=transaction.name, error=error,
        )  # fmt: skip
        return True

    def get_bind(self, *args: Any, bind: Engine | Connection | None = None, **kwargs: Any) -> Engine | Connection:
        """Return the unit's engine.  Every statement and every flush calls this before anything is sent."""
        transaction = self.transaction_of_unit
        if transaction is None:
            return super().get_bind(*args, bind=bind, **kwargs)
        if bind is not None and bind is not self.bind and bind is not transaction.engine:
            raise PropagationError(
                f"a statement in {transaction.name} was sent to another bind, but a unit is one transaction on one engine; "
                "begin a unit of the other engine's manager"
            )
        # The connection checks the task again just before it sends.  If the unit has its connection and nothing is in flight,
        # what SQLAlchemy does until then harms nobody.
        if not transaction.is_calm():
            transaction.check_usable()
        if transaction.engine is None:
            assert isinstance(self.bind, UnitEngine)
            transaction.engine = self.bind.of(transaction)
        return transaction.engine

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Write pending changes, unless the unit is read-only, doomed or another task's."""
        transaction = self.transaction_of_unit
        if transaction is None:
            super().flush(objects)
            return
        if not has_changes(self):
            return
        if transaction.is_ending_here():
            super().flush(objects)
            return
        try:
            transaction.check_usable()
            if transaction.read_only:
                refuse_changes(self, transaction)
        except UnitOfWorkError as error:
            transaction.doom.mark(error)
            raise
        if transaction.preamble is not None and transaction.connection is None and transaction.preamble.has_hook:
            self.connection()  # not in the middle of the flush: the hook may add objects
        before = transaction.owner.hold()
        try:
            super().flush(objects)
        except StaleDataError as error:
            self._is_stale(error)
            raise
        except Exception as error:
            transaction.doom.mark(error, failure=classify(error))
            raise
        finally:
            transaction.owner.let_go(before)
        if transaction.versions is not None:
            transaction.versions.flushed()

    def commit(self) -> None:
        """Refuse: the unit commits at its end."""
        transaction = self.transaction_of_unit
        if transaction is None or not transaction.is_ending_here():
            if transaction is not None:
                before_commit(transaction)
            super().commit()
            return
        here = getcurrent()
        being_committed[here] = transaction
        try:
            super().commit()
        finally:
            del being_committed[here]

    def rollback(self) -> None:
        """Roll back, and doom the unit; refuse it while another task's statement is in flight."""
        transaction = self.transaction_of_unit
        if transaction is None or transaction.is_ending_here() or transaction.phase.is_over:
            super().rollback()
            return
        before = transaction.hold_for_rollback()
        try:
            super().rollback()
        finally:
            transaction.owner.let_go(before)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """Begin a savepoint; refuse anything else, as the unit has begun."""
        if not nested:
            self._refuse("begin", "has begun already; remove the begin(), or use begin_nested() for a savepoint")
        return super().begin(nested)

    def close(self) -> None:
        """Refuse inside the unit: objects would be detached and later SQL would begin a second transaction."""
        self._refuse("close", "closes it at its own end; remove the close(), or the 'async with' around the session")
        super().close()

    def reset(self) -> None:
        """Refuse inside the unit, as `close`."""
        self._refuse("reset", "closes it at its own end; remove the reset(), and call doom() to roll back")
        super().reset()

    def invalidate(self) -> None:
        """Refuse inside the unit, as `close`."""
        self._refuse("invalidate", "closes it at its own end; remove the invalidate(), and call doom() to roll back")
        super().invalidate()

    def _refuse(self, method: str, why: str) -> None:
        transaction = self.transaction_of_unit
        if transaction is None or transaction.is_ending_here() or transaction.phase is Phase.ENDED:
            return
        error = PropagationError(f"{method}() was called on the session of {transaction.name}, which {why}")
        transaction.doom.mark(error, hard=True)
        raise error

    def _merge(self, state: InstanceState[Any], *args: Any, **kwargs: Any) -> Any:
        # merge(), merge_all() and the cascades of both call this.
        if self.transaction_of_unit is not None:
            check_merge(self.transaction_of_unit, state)
        if self.on_merge is None:
            return super()._merge(state, *args, **kwargs)
        try:
            return self.on_merge(self, state, partial(super()._merge, state, *args, **kwargs))
        except StaleDataError as error:
            self._is_stale(error)
            raise

    def refresh(
        self, instance: object, attribute_names: Iterable[str] | None = None, with_for_update: Any = None
    ) -> None:
        """Refresh an object; a versioned one with all its attributes, as its version is for the whole row."""
        if attribute_names is not None and self.on_refresh is not None:
            attribute_names = self.on_refresh(self, instance, attribute_names)
        super().refresh(instance, attribute_names, with_for_update)

    def expire_all(self) -> None:
        """Expire all objects."""
        if self.on_expire is not None:
            for state in self.identity_map.all_states():
                self.on_expire(state, None)
        super().expire_all()

    def _expire_state(self, state: InstanceState[Any], attribute_names: Iterable[str] | None) -> None:
        # expire() and refresh() call this; for whole objects and their cascades they also call the method below.
        if self.on_expire is not None and attribute_names:
            attribute_names = list(attribute_names)
            self.on_expire(state, attribute_names)
        super()._expire_state(state, attribute_names)

    def _conditional_expire(self, state: InstanceState[Any], autoflush: bool | None = None) -> None:  # noqa: FBT001  # SQLAlchemy's signature
        if self.on_expire is not None:
            self.on_expire(state, None)
        super()._conditional_expire(state, autoflush)

    def _before_attach(self, state: InstanceState[Any], obj: object) -> bool:
        # The before_attach event is too late: SQLAlchemy raises "already attached to session" before it.
        if self.transaction_of_unit is not None and state.session_id != self.hash_key:
            check_attach(self.transaction_of_unit, state)
        return super()._before_attach(state, obj)


def wait_for_locks(session: Session) -> None:
    """Let an attempt that has become the last wait for locks, also in its COMMIT."""
    connection = session.connection()
    if isinstance(connection, UnitConnection):
        lift(connection)


def has_changes(session: Session) -> bool:
    """Say whether a flush might write something."""
    # The public `new`, `dirty` and `deleted` build a set each time, and each statement's autoflush asks.
    return not session._is_clean()


def refuse_changes(session: Session, transaction: Transaction) -> None:
    """Raise if an object of a session that is for reading was changed.

    Raises:
        ReadOnlyError: naming the object and the cures.
    """
    changed = _changed_object(session) if has_changes(session) else None
    if changed is not None:
        raise ReadOnlyError(transaction.read_only_message(f"{describe(changed)} was changed"))


def _changed_object(session: Session) -> object | None:
    """Return one object that a flush would write, or None."""
    pending: list[object] = [*session.new, *session.deleted]
    if pending:
        return pending[0]
    dirty: list[object] = list(session.dirty)
    return next((instance for instance in dirty if session.is_modified(instance)), None)


_unit_classes: dict[type[Session], type[Session]] = {Session: UnitSession}


def unit_session_class(base: type[Session]) -> type[Session]:
    """Return `base` with the rules of a unit on top; one class for each base."""
    if base not in _unit_classes:
        _unit_classes[base] = type(f"Unit{base.__name__}", (UnitSession, base), {})
    return _unit_classes[base]


# -- the events


# insert: before the user's listeners on Session, some of which were registered before this module was imported.
@event.listens_for(UnitSession, "after_begin", insert=True)
def _after_begin(session: UnitSession, session_transaction: SessionTransaction, connection: UnitConnection) -> None:
    transaction = session.transaction_of_unit
    if transaction is None or session_transaction.nested or transaction.connection is connection:
        return
    transaction_begun(transaction, connection)
    database, driver = transaction.database, transaction.database.driver
    if driver.keeps_cancel_requests:
        try:
            driver.keep_cancel_request(connection)
        except asyncio.CancelledError as error:  # SQLAlchemy does not know what was cut off
            connection.invalidate(error)
            raise
    if not database.recognised:
        database.recognise(connection)
    try:
        beginnings = transaction.beginnings
        database.system.open(connection, driver, transaction)
        transaction.beginnings = beginnings  # what we have sent reads nothing
        transaction.watch = driver.watch(connection.raw) if transaction.phase.is_active else None
        if transaction.enclosing:
            transaction.lock_watch = watch_locks(transaction)
        if database.system.replaces_levels and transaction.isolation is not None:
            _check_honoured(connection, transaction, transaction.isolation)
        if transaction.preamble is not None:
            _call_hook(session, session_transaction, transaction, transaction.preamble)
    except BaseException as error:
        if transaction.preamble is not None:  # or a body that catches it could go on without its settings
            mark = transaction.doom.marked
            transaction.doom.mark(error, failure=None if mark is None else mark.failure, hard=True)
        raise


def _check_honoured(connection: Connection, transaction: Transaction, isolation: IsolationLevel) -> None:
    try:
        transaction.database.system.check_honoured(connection, isolation, who=transaction.name)
    except ValueError as error:  # or a body that catches it could go on at the other level
        transaction.doom.mark(error, hard=True)
        raise


def _call_hook(session: UnitSession, begun: SessionTransaction, transaction: Transaction, preamble: Preamble) -> None:
    """Await the manager's `on_begin`: what it sends comes before the first statement of the body, and before a savepoint of that."""
    hook = preamble.hook()
    if hook is None:
        return
    # SQLAlchemy refuses statements until the listeners have run, and would send them in the savepoint.
    provisioning, begun._state = begun._state, SessionTransactionState.ACTIVE
    innermost, session._transaction = session._transaction, begun
    block, session._trans_context_manager = session._trans_context_manager, None
    # If its connection is found dead, it is awaited again with the whole beginning.
    beginnings, transaction.beginnings = transaction.beginnings, 0
    try:
        await_only(hook)
    finally:
        begun._state, session._transaction, session._trans_context_manager = provisioning, innermost, block
        transaction.beginnings = beginnings


@event.listens_for(UnitSession, "after_commit", insert=True)
def _after_commit(session: UnitSession) -> None:
    transaction = session.transaction_of_unit
    if transaction is not None and transaction.phase is Phase.SENT:  # else it is the release of a savepoint
        # Answered: from now on an error of the user's listeners is not an error of COMMIT.
        transaction.phase = Phase.ENDING
        if transaction.last_write is not None and transaction.wrote and transaction.connection is not None:
            _note_position(transaction, transaction.last_write, transaction.connection)


def _note_position(transaction: Transaction, last_write: LastWrite, connection: Connection) -> None:
    """Ask how far a replica must have replayed to show what was committed."""
    try:
        await_only(last_write.note(connection, transaction.database))
    except Exception as error:
        log(
            logging.WARNING,
            "%s is committed, but the primary did not tell its position (%s); its client will read from the primary",
            transaction.name, type(error).__name__, function=transaction.name, error=error,
        )  # fmt: skip
        connection.invalidate()


@event.listens_for(UnitSession, "after_transaction_create")
def _transaction_created(session: UnitSession, session_transaction: SessionTransaction) -> None:
    if session_transaction.nested and session.transaction_of_unit is not None:
        session_transaction.__class__ = UnitSavepoint
        session.transaction_of_unit.doom.begin_savepoint(session_transaction)


@event.listens_for(UnitSession, "after_transaction_end")
def _transaction_ended(session: UnitSession, session_transaction: SessionTransaction) -> None:
    if session_transaction.nested and session.transaction_of_unit is not None:
        session.transaction_of_unit.doom.end_savepoint(session_transaction)


@event.listens_for(UnitSession, "after_rollback")
def _rolled_back(session: UnitSession) -> None:
    transaction = session.transaction_of_unit
    if transaction is None:
        return
    savepoint = transaction.doom.top_of(SessionTransaction)
    if savepoint is not None:
        transaction.doom.roll_back_savepoint(savepoint)
    else:
        session_rolled_back(transaction, sys.exception())
