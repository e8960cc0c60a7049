"""What one unit knows about versions: those a client expects, objects to touch, and versions to restore after a savepoint."""

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
    """A version that a client has seen, and that the unit's work depends on.

    Attributes:
        state: of the object.
        instance: kept, because the session's references are weak.
        expected: what the client said.
        now: what the row must be at by now, after the unit's own changes.
        checked: it was compared in the database, and the unit has the row's lock.
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
        """Raise if the row is not at the expected version.

        Args:
            found: the row's version, None if the row is gone.

        Raises:
            StaleVersionError: with both versions.
        """
        if found != self.now:
            raise self.stale(found)

    def stale(self, found: Any) -> StaleVersionError:
        """Return the error for another version that was found."""
        return stale_version(type(self.instance), self.key, self.expected, found)


class _Saved(NamedTuple):
    """A version before a savepoint first changed it, with its object, as the session's references are weak."""

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
        """Expect this version of an object from now on; if another was expected before, that one counts."""
        expectation = Expectation(instance, version)
        return self.expectations.setdefault(expectation.state, expectation)

    # -- around the flush

    def writing(self, session: Session, state: InstanceState[Any], version: Any) -> None:
        """An object is about to be written: compare once more, as it may have been refreshed."""
        expectation = self.expectations.get(state)
        if expectation is not None:
            expectation.compare(version)
        self.being_written.append((state.obj(), version))
        self.save(session, state)

    def move_on(self, state: InstanceState[Any], version: Any) -> None:
        """The unit itself has written a row: expect the new version from now on."""
        expectation = self.expectations.get(state)
        if expectation is not None:
            expectation.now = version
            expectation.checked = True

    def flushed(self) -> None:
        """A flush has written all it had to."""
        self.being_written.clear()
        for state, expectation in self.expectations.items():
            if state.deleted:
                expectation.checked = True

    def check_unwritten(self, session: Session) -> None:
        """Lock and compare the rows that the body has not written.

        Raises:
            StaleVersionError: a row was changed or deleted since the client saw it.
        """
        self._compare_in_database(session, [each for each in self.expectations.values() if not each.checked])

    def check_before_bulk(self, session: Session, mapper: Mapper[Any]) -> None:
        """Compare before a statement whose WHERE does not compare versions; the locks last until the unit's end."""
        unchecked = [each for each in self.expectations.values() if not each.checked and each.state.mapper.isa(mapper)]
        self._compare_in_database(session, unchecked)
        for expectation in unchecked:
            self.save(
                session, expectation.state
            )  # if a savepoint is rolled back, the lock is gone and the check is void
            expectation.checked = True

    def _compare_in_database(self, session: Session, expectations: Sequence[Expectation]) -> None:
        for mapper, group in _by_mapper(expectations):
            found = read_versions(session.connection(), mapper, [each.key for each in group], lock=True)
            for expectation in group:
                expectation.compare(found.get(expectation.key))

    # -- around savepoints

    def save(self, session: Session, state: InstanceState[Any]) -> None:
        """Keep an object's version: rolling back the innermost savepoint expires all that changed in it."""
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
        """A savepoint is being rolled back."""
        self._undone.add(savepoint)

    def end_savepoint(self, session: Session, savepoint: SessionTransaction) -> None:
        """A savepoint has ended: restore its versions if it was rolled back, else hand them to the savepoint around it."""
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
        """Read the versions again, after the rollback, and return the error for a row that has changed.

        The expected versions are compared; if there are none, those that the failed flush was writing.
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
        """Return the error for a write that found another version, when no row tells any more which version."""
        one = next(iter(self.expectations.values())) if len(self.expectations) == 1 else None
        return StaleVersionError(
            f"{who} wrote a row that was changed since it was read, in a unit that expects a version; read it again, and let "
            "the client decide",
            model=None if one is None else type(one.instance),
            key=None if one is None else one.key,
            expected=None if one is None else one.expected,
        )


def _by_mapper(expectations: Iterable[Expectation]) -> list[tuple[Mapper[Any], list[Expectation]]]:
    # By the version's table, so one statement asks for all classes of an inheritance.
    ordered = sorted(expectations, key=lambda each: str(version_table(each.state.mapper)))
    groups = groupby(ordered, key=lambda each: version_table(each.state.mapper))
    return [(members[0].state.mapper, members) for members in (list(group) for _, group in groups)]


def versions_of(transaction: Transaction) -> Versions:
    """Return what the unit knows of versions; make it if it is not there yet."""
    if not isinstance(transaction.versions, Versions):
        transaction.versions = Versions()
    return transaction.versions
