"""What one unit knows about versions: those that a client expects, objects to be touched, and what savepoints bring back."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import inspect

from sqla_uow._versions.reading import bring_back, seen
from sqla_uow._versions.rows import read_versions, stale_version, version_table
from sqla_uow.errors import StaleVersionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import InstanceState, Mapper, Session, SessionTransaction

    from sqla_uow._transaction.transaction import Transaction

__all__ = ["Expectation", "Versions", "versions_of"]


class Expectation:
    """A version that a client has seen, and the unit's work stands on.

    Attributes:
        state: of the object.
        instance: kept, because the session's references are weak.
        expected: what the client said.
        now: that, moved on by the unit's own changes.
        checked: the database has compared it, and holds the row's lock for us.
    """

    __slots__ = ("checked", "expected", "instance", "now", "state")

    def __init__(self, instance: object, version: Any) -> None:
        self.instance: object = instance
        self.state: InstanceState[Any] = inspect(instance)
        self.expected: Any = version
        self.now: Any = version
        self.checked: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        assert self.state.key is not None
        return self.state.key[1]

    def compare(self, found: Any) -> None:
        """Raise if the row is at another version than expected, or gone, which is None.

        Raises:
            StaleVersionError: with both versions.
        """
        if found != self.now:
            raise self.stale(found)

    def stale(self, found: Any) -> StaleVersionError:
        """Return the error for a version that was found instead."""
        return stale_version(type(self.instance), self.key, self.expected, found)


class _Saved(NamedTuple):
    """A version as it was before a savepoint's first change of it; with the object, as the session's are weak."""

    instance: object
    version: Any
    now: Any
    checked: bool


class Versions:
    """The versions of one unit."""

    __slots__ = ("_saved", "_undone", "being_written", "expectations", "touched")

    def __init__(self) -> None:
        self.expectations: dict[InstanceState[Any], Expectation] = {}
        self.touched: set[InstanceState[Any]] = set()
        self.being_written: list[tuple[object, Any]] = []
        self._saved: dict[SessionTransaction, dict[InstanceState[Any], _Saved]] = {}
        self._undone: set[SessionTransaction] = set()

    def expect(self, instance: object, version: Any) -> Expectation:
        """Remember what is expected of an object from now on; what was expected before still is."""
        expectation = Expectation(instance, version)
        return self.expectations.setdefault(expectation.state, expectation)

    # -- around the flush

    def writing(self, session: Session, state: InstanceState[Any], version: Any) -> None:
        """Compare once more, before SQL is made of an object: it may have been refreshed since."""
        expectation = self.expectations.get(state)
        if expectation is not None:
            expectation.compare(version)
        self.being_written.append((state.obj(), version))
        self.save(session, state)

    def move_on(self, state: InstanceState[Any], version: Any) -> None:
        """Take note that the unit has written a row itself: that version is expected from now on."""
        expectation = self.expectations.get(state)
        if expectation is not None:
            expectation.now = version
            expectation.checked = True

    def flushed(self) -> None:
        """Take note that a flush has written all it had to."""
        self.being_written.clear()
        for state, expectation in self.expectations.items():
            if state.deleted:
                expectation.checked = True

    def check_unwritten(self, session: Session) -> None:
        """Compare in the database, under its lock, what the body has not written.

        Raises:
            StaleVersionError: a row was changed or deleted since the client saw it.
        """
        self._compare_in_database(session, [each for each in self.expectations.values() if not each.checked])

    def check_before_bulk(self, session: Session, mapper: Mapper[Any]) -> None:
        """Compare before a statement whose WHERE says nothing about versions; the locks last until the unit's end."""
        unchecked = [each for each in self.expectations.values() if not each.checked and each.state.mapper.isa(mapper)]
        self._compare_in_database(session, unchecked)
        for expectation in unchecked:
            self.save(session, expectation.state)  # with a savepoint the lock goes, and the check with it
            expectation.checked = True

    def _compare_in_database(self, session: Session, expectations: Sequence[Expectation]) -> None:
        for mapper, group in _by_mapper(expectations):
            found = read_versions(session.connection(), mapper, [each.key for each in group], lock=True)
            for expectation in group:
                expectation.compare(found.get(expectation.key))

    # -- around savepoints

    def save(self, session: Session, state: InstanceState[Any]) -> None:
        """Keep an object's version for the innermost savepoint's rollback, which expires all that changed in it."""
        savepoint = session.get_nested_transaction()
        if savepoint is None:
            return
        saved = self._saved.setdefault(savepoint, {})
        version = seen(state)
        if state not in saved and version is not None:
            expectation = self.expectations.get(state)
            now, checked = (None, False) if expectation is None else (expectation.now, expectation.checked)
            saved[state] = _Saved(state.obj(), version, now, checked)

    def roll_back_savepoint(self, savepoint: SessionTransaction) -> None:
        """Take note that a savepoint is being rolled back."""
        self._undone.add(savepoint)

    def end_savepoint(self, session: Session, savepoint: SessionTransaction) -> None:
        """Bring back the versions of a savepoint that was rolled back; hand those of a released one to the next."""
        saved = self._saved.pop(savepoint, {})
        if savepoint in self._undone:
            self._undone.discard(savepoint)
            for state, before in saved.items():
                self._restore(session, state, before)
            return
        outer = savepoint.parent
        while outer is not None and not outer.nested:
            outer = outer.parent
        if outer is not None and saved:
            self._saved[outer] = saved | self._saved.get(outer, {})

    def _restore(self, session: Session, state: InstanceState[Any], before: _Saved) -> None:
        if state.key is None or state.session is not session:
            return
        bring_back(before.instance, before.version)
        expectation = self.expectations.get(state)
        if expectation is not None and before.now is not None:
            expectation.now, expectation.checked = before.now, before.checked

    # -- after the end

    def find_stale(self, connection: Connection) -> StaleVersionError | None:
        """Read afresh, after the rollback, and return the error for a row that is not as it was.

        Looked at are the expectations; where there are none, what the flush that failed was writing.
        """
        looked_at = list(self.expectations.values()) or [
            Expectation(*each) for each in self.being_written if each[1] is not None
        ]
        for mapper, group in _by_mapper(looked_at):
            found = read_versions(connection, mapper, [each.key for each in group])
            for expectation in group:
                if found.get(expectation.key) != expectation.expected:
                    return expectation.stale(found.get(expectation.key))
        return None

    def stale(self, who: str) -> StaleVersionError:
        """Return the error for a write that found another version, where no row tells which one any more."""
        one = next(iter(self.expectations.values())) if len(self.expectations) == 1 else None
        return StaleVersionError(
            f"{who} wrote a row that was changed since it was read, in a unit that expects a version; read it again, and let "
            "the client decide",
            model=None if one is None else type(one.instance),
            key=None if one is None else one.key,
            expected=None if one is None else one.expected,
        )


def _by_mapper(expectations: Iterable[Expectation]) -> list[tuple[Mapper[Any], list[Expectation]]]:
    # By the version's table, so that one statement asks for all classes of an inheritance.
    ordered = sorted(expectations, key=lambda each: str(version_table(each.state.mapper)))
    groups = groupby(ordered, key=lambda each: version_table(each.state.mapper))
    return [(members[0].state.mapper, members) for members in (list(group) for _, group in groups)]


def versions_of(transaction: Transaction) -> Versions:
    """Return the unit's versions, from now on there."""
    if not isinstance(transaction.versions, Versions):
        transaction.versions = Versions()
    return transaction.versions
