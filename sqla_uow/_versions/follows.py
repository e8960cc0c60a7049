"""``__version_follows__``: a change of a part gives the whole it belongs to a new version.

Before each flush the wholes of all that it will write are looked up, by foreign keys and relationships; a part that moves has an
old whole and a new one.  A whole in memory is touched; the others get new versions by one UPDATE.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import event, inspect, select, tuple_, update
from sqlalchemy.orm import RelationshipDirection, RelationshipProperty, Session
from sqlalchemy.orm.attributes import flag_dirty, get_history

from sqla_uow._session.session import UnitSession
from sqla_uow._versions.expectations import versions_of
from sqla_uow._versions.mapping import VersionMixin
from sqla_uow._versions.rows import counting, key_columns, read_versions, version_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import InstanceState, Mapper

    from sqla_uow._versions.expectations import Versions

__all__: list[str] = []

Key = tuple[Any, ...]


class Following:
    """One relationship whose objects are parts of its owner.

    Attributes:
        whole: the model with ``__version_follows__``.
        name: of the relationship, on it.
        part: the model at its other end.
        columns: the part's foreign key, in the order of the whole's identity.
    """

    def __init__(self, whole: Mapper[Any], name: str) -> None:
        relationship = whole.get_property(name)
        who = f"{whole.class_.__name__}.{name}, named in __version_follows__,"
        if (
            not isinstance(relationship, RelationshipProperty)
            or relationship.direction is not RelationshipDirection.ONETOMANY
        ):
            raise TypeError(
                f"{who} is not a one-to-many relationship; name one, whose objects have a foreign key to it"
            )
        self.whole = whole
        self.name = name
        self.part: Mapper[Any] = cast("Any", relationship).mapper
        keys = [whole.get_property_by_column(column) for column in whole.primary_key]
        remote = {whole.get_property_by_column(own): other for own, other in relationship.local_remote_pairs or ()}
        if any(key not in remote for key in keys):
            raise TypeError(f"{who} does not refer to the primary key; only a relationship by it can be followed")
        self.columns: list[ColumnElement[Any]] = [remote[key] for key in keys]

    @cached_property
    def upwards(self) -> list[str]:
        """The part's relationships back to the whole."""
        back = [each for each in self.part.relationships if each.direction is RelationshipDirection.MANYTOONE]
        return [each.key for each in back if set(each.local_columns) == set(self.columns)]

    @cached_property
    def attributes(self) -> list[str]:
        """The part's attributes that are mapped to its foreign key."""
        return [self.part.get_property_by_column(column).key for column in self.columns]


_followings: list[Following] = []
_undefined: list[tuple[Mapper[Any], str]] = []
"""Relationships that the backref of another model will make later."""


@event.listens_for(VersionMixin, "after_mapper_constructed", propagate=True)
def _constructed(_mapper: Mapper[Any], model: type[VersionMixin]) -> None:
    if not _is_names(model.__version_follows__):
        raise TypeError(
            f"{model.__name__}.__version_follows__ is {model.__version_follows__!r}; make it a tuple of names of "
            "relationships, as ('lines',)"
        )


def _is_names(names: tuple[object, ...]) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) for name in names)


@event.listens_for(VersionMixin, "mapper_configured", propagate=True)
def _configured(mapper: Mapper[Any], model: type[VersionMixin]) -> None:
    parent = mapper.inherits.class_ if mapper.inherits is not None else None
    for name in model.__version_follows__:
        if name in getattr(parent, "__version_follows__", ()):
            continue  # it is the parent's, and followed for all its children
        if not _followings and not _undefined:  # once: a class accepts the same listener repeatedly
            event.listen(UnitSession, "before_flush", _before_flush)
        if mapper.has_property(name):
            _followings.append(Following(mapper, name))
        else:
            _undefined.append((mapper, name))


def _all_followings() -> list[Following]:
    while _undefined:
        mapper, name = _undefined[-1]
        if not mapper.has_property(name):
            raise TypeError(
                f"{mapper.class_.__name__}.__version_follows__ names {name!r}, which is not a relationship of it; name one"
            )
        _followings.append(Following(mapper, name))
        _undefined.pop()
    return _followings


# -- before a flush


def _before_flush(session: UnitSession, *_: Any) -> None:
    transaction = session.transaction_of_unit
    if transaction is None:  # a session that somebody has made of the units' class
        return
    search = _Search(session, _all_followings(), versions_of(transaction))
    search.run()
    for mapper, keys in search.by_mapper():
        _count(session, search.versions, mapper, keys)


class _Search:
    """The wholes of all that a flush will write, and the wholes of these."""

    def __init__(self, session: Session, followings: list[Following], versions: Versions) -> None:
        self.session = session
        self.followings = followings
        self.versions = versions
        self.found: dict[tuple[Mapper[Any], Key], None] = {}

    def run(self) -> None:
        changed = [*self.session.new, *self.session.deleted]
        changed += [each for each in self.session.dirty if self._is_changed(each)]
        for instance in changed:
            self._add_all(inspect(instance))
        for instance in [*self.session.new, *self.session.dirty]:
            self._look_into_collections(inspect(instance))

    def by_mapper(self) -> Iterator[tuple[Mapper[Any], list[Key]]]:
        """Yield each model and the keys found, wholes before their parts, as a flush writes them."""
        for mapper in sorted({mapper for mapper, _ in self.found}, key=lambda each: len(self._above(each, set()))):
            yield mapper, [key for other, key in self.found if other is mapper]

    def _above(self, mapper: Mapper[Any], seen: set[Mapper[Any]]) -> set[Mapper[Any]]:
        """Return the models that get a new version when this one is changed."""
        for following in self.followings:
            if mapper.isa(following.part) and following.whole not in seen:
                seen.add(following.whole)
                self._above(following.whole, seen)
        return seen

    def _is_changed(self, instance: object) -> bool:
        return self.session.is_modified(instance) or inspect(instance) in self.versions.touched

    def _look_into_collections(self, state: InstanceState[Any]) -> None:
        for following in self.followings:
            if state.mapper.isa(following.whole):
                history = state.attrs[following.name].history
                parts = [part for part in (*(history.added or ()), *(history.deleted or ())) if part is not None]
                if parts:
                    self._add(following.whole, state.key[1] if state.key is not None else None)
                for part in parts:  # without a backref nothing else tells which whole it had
                    self._add_all(inspect(part))

    def _add_all(self, state: InstanceState[Any]) -> None:
        for following in self.followings:
            if state.mapper.isa(following.part):
                for key in self._wholes(following, state):
                    self._add(following.whole, key)

    def _add(self, mapper: Mapper[Any], key: Key | None) -> None:
        if key is None or None in key or (mapper, key) in self.found:
            return
        self.found[mapper, key] = None
        instance = self._loaded(mapper, key)
        if instance is not None:
            self._add_all(inspect(instance))
            return
        for following in self.followings:
            if mapper.isa(following.part):
                self._add(following.whole, self._stored(following, mapper, key))

    def _loaded(self, mapper: Mapper[Any], key: Key) -> object | None:
        return self.session.identity_map.get(mapper.identity_key_from_primary_key(key))

    def _wholes(self, following: Following, state: InstanceState[Any]) -> Iterator[Key | None]:
        """Return the keys of the wholes that an object belongs to, before the flush and after."""
        instance = state.obj()
        histories = [get_history(instance, name) for name in following.attributes]
        yield tuple(next(iter(history.sum()[:1]), None) for history in histories)
        yield tuple(next(iter(history.deleted or history.unchanged or ()), None) for history in histories)
        if state.key is not None and any(history.added and not history.deleted for history in histories):
            yield self._stored(following, state.mapper, state.key[1])  # overwritten before it was loaded
        for name in following.upwards:
            for whole in state.attrs[name].history.sum():
                if whole is not None and inspect(whole).key is not None:
                    yield inspect(whole).key[1]

    def _stored(self, following: Following, mapper: Mapper[Any], key: Key) -> Key | None:
        """Read the whole's key from a part's row."""
        where = tuple_(*mapper.primary_key) == tuple_(*key)
        row = self.session.connection().execute(select(*following.columns).select_from(mapper).where(where)).first()
        return None if row is None else tuple(row)


def _count(session: Session, versions: Versions, mapper: Mapper[Any], keys: Iterable[Key]) -> None:
    """Give each whole a new version: in memory by the flush, which checks the old one, the others at once and unchecked."""
    loaded: dict[Key, object] = {}
    for key in keys:
        instance = session.identity_map.get(mapper.identity_key_from_primary_key(key))
        if instance is not None:
            loaded[key] = instance
    others = [key for key in keys if key not in loaded]
    for instance in loaded.values():
        if instance not in session.deleted:
            versions.touched.add(inspect(instance))
            flag_dirty(instance)
    if not others:
        return  # the flush writes in the order of the keys
    # All are locked in the order of the keys, or two units that change parts of the same wholes could deadlock.
    read_versions(session.connection(), mapper, [*loaded, *others], lock=True)
    where = tuple_(*key_columns(mapper)).in_(others)
    session.connection().execute(update(version_table(mapper)).where(where).values(counting(mapper)))
