"""The version mixins, and how their check survives every way to write a mapping.

SQLAlchemy's ``version_id_col`` counts and checks.  It is set when a mapper has been constructed: the ``__mapper_args__`` of a mixin
are lost if a model has its own, and an imperative mapping reads none.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import ColumnDefault, DateTime, DefaultClause, Table, event, inspect
from sqlalchemy.orm import ColumnProperty, Mapped, Mapper, MapperProperty, declared_attr, mapped_column, synonym
from sqlalchemy.util import get_annotations

from sqla_uow._databases.database import recognised
from sqla_uow._session.instances import describe
from sqla_uow._versions.kinds import INTEGER, TIMESTAMP, UUID, XMIN, UtcTimestamp, VersionKind

if TYPE_CHECKING:
    import uuid
    from collections.abc import Collection

    from sqlalchemy import Column
    from sqlalchemy.engine import Connection

__all__ = [
    "INFO_KEY",
    "VersionMixin",
    "Versioned",
    "VersionedByTimestamp",
    "VersionedByUUID",
    "VersionedByXmin",
    "attribute_of",
    "check_type",
    "kind_of",
]

INFO_KEY = "sqla_uow.version"
"""Each version column's ``column.info`` has it: "integer", "uuid" or "timestamp" (or "xmin", which is PostgreSQL's own column).

The autogenerate of migrations finds version columns by it.
"""


class VersionMixin:
    """What the four mixins share.

    Attributes:
        __version_attr__: the attribute that is mapped to the version; if it is not ``version``, that is its synonym.
        __version_follows__: relationships whose objects count as parts of this one: see `touch`.
    """

    __version_attr__: ClassVar[str] = "version"
    __version_follows__: ClassVar[tuple[str, ...]] = ()
    __version_kind__: ClassVar[VersionKind]

    if not TYPE_CHECKING:
        # Without an annotation: a model with MappedAsDataclass would take it for a field.
        @declared_attr
        def version(cls):  # noqa: ANN202, N805  # SQLAlchemy calls it with the class, and reads its annotation
            if cls.__version_attr__ != "version":
                return synonym(cls.__version_attr__)
            if cls.__version_kind__ in (INTEGER, UUID) and any(
                "version" in get_annotations(base) for base in cls.__mro__
            ):
                # The model's own annotation says the type, and may be Annotated.
                return mapped_column(nullable=False)
            return cls.__version_kind__.column()


class Versioned(VersionMixin):
    """Count a row's changes: ``version`` is 1 at first, and grows by one with each UPDATE.

    An UPDATE or DELETE of a row that somebody else has changed since it was read raises `StaleVersionError`.  Put it
    before the base: ``class Order(Versioned, Base)``.  For another column name say
    ``version: Mapped[int] = mapped_column("lock_version")``, for another attribute ``__version_attr__ = "rev"``.

    A constructor argument ``version=`` is ignored: no caller can choose the first version.
    """

    __version_kind__ = INTEGER
    if TYPE_CHECKING:
        version: Mapped[int]


class VersionedByUUID(VersionMixin):
    """Like `Versioned`, but each version is a random UUID, which does not tell how often a row has changed."""

    __version_kind__ = UUID
    if TYPE_CHECKING:
        version: Mapped[uuid.UUID]


class VersionedByTimestamp(VersionMixin):
    """Like `Versioned`, but the version is the time of the last change, in UTC and aware; it grows by 1 us or more."""

    __version_kind__ = TIMESTAMP
    if TYPE_CHECKING:
        version: Mapped[datetime]


class VersionedByXmin(VersionMixin):
    """Like `Versioned`, for PostgreSQL and without a column: the version is ``xmin``, the row's last transaction.

    Writes past the ORM count too.  It does not see other writes of its own transaction.  It cannot be used with
    partitioned tables.
    """

    __version_kind__ = XMIN
    if TYPE_CHECKING:
        version: Mapped[int]


def kind_of(mapper: Mapper[Any]) -> VersionKind | None:
    """Return the kind of a model's version, None if the model has no version mixin."""
    kind: VersionKind | None = getattr(mapper.class_, "__version_kind__", None)
    return kind


def attribute_of(mapper: Mapper[Any]) -> str:
    """Return the name of the attribute that is mapped to the version of a model with a mixin."""
    name: str = mapper.class_.__version_attr__
    return name


def check_type(mapper: Mapper[Any], version: Any) -> None:
    """Refuse a value that cannot be a version of a model: it would equal no version, and look like a conflict.

    Raises:
        TypeError: another type, or a datetime without a time zone.
    """
    kind, model = kind_of(mapper), mapper.class_.__name__
    assert kind is not None
    if not isinstance(version, kind.python_type) or isinstance(version, bool):
        raise TypeError(
            f"the version of {model} is of type {kind.python_type.__name__}, but {version!r} was expected; convert what "
            "the client sent"
        )
    if isinstance(version, datetime) and version.tzinfo is None:
        raise TypeError(f"the version of {model} is an aware datetime, but {version!r} has no time zone; give it one")


@event.listens_for(VersionMixin, "after_mapper_constructed", propagate=True)
def _constructed(mapper: Mapper[Any], model: type[VersionMixin]) -> None:
    """Make the version column the mapper's ``version_id_col``, or raise why that is impossible."""
    _check_place(mapper, model)
    kind = model.__version_kind__
    inherited = mapper.inherits.version_id_col if mapper.inherits is not None else None
    if inherited is not None:
        _check_child(mapper, inherited)
        _send_no_returning(mapper, kind)
        return
    column = _column(mapper, model)
    if mapper.version_id_col is not None and mapper.version_id_col is not column:
        raise TypeError(
            f"{model.__name__} has a version mixin and another version_id_col, {mapper.version_id_col.key!r}, in its "
            "__mapper_args__; leave one of them out"
        )
    _complete(column, kind, model)
    own = mapper.version_id_generator
    # SQLAlchemy's default counts up, whatever the type; a generator that the model has chosen stays.
    if mapper.version_id_col is None or getattr(own, "__module__", None) == Mapper.__module__:
        mapper.version_id_generator = kind.following or False
    mapper.version_id_col = column
    _send_no_returning(mapper, kind)
    _load_always(mapper.get_property_by_column(column))
    event.listen(getattr(model, model.__version_attr__), "set", _refuse_assignment, propagate=True)


def _check_place(mapper: Mapper[Any], model: type[VersionMixin]) -> None:
    """Refuse a model that has no table to keep its version in."""
    if mapper.inherits is None:
        return
    parent = mapper.inherits.class_.__name__
    if mapper.concrete:
        raise TypeError(
            f"{model.__name__} is a concrete child of {parent}, whose version is in another "
            "table; make it a joined or single-table child, or a model of its own with the mixin"
        )
    if mapper.single and mapper.inherits.version_id_col is None:
        raise TypeError(
            f"{model.__name__} has a version mixin but shares the table of {parent}, which has "
            f"none; put the mixin on {parent}"
        )


def _send_no_returning(mapper: Mapper[Any], kind: VersionKind) -> None:
    """Tell SQLAlchemy that the version is ours although its column has a server default.

    Else it asks for it with RETURNING, which a post_update of several rows cannot have (SQLAlchemy 2.1.9).
    """
    if kind.following is not None:
        mapper.__dict__["_version_id_has_server_side_value"] = False  # memoized there; nothing public says it


class _LoadedAlways:
    """Makes a column's property ignore loader options: an object that was loaded without its version could not be checked."""

    __slots__ = ()

    def _get_context_loader(self, *_: Any) -> None:
        return None


def _load_always(version: MapperProperty[Any]) -> None:
    """Let each load of an object load its version, despite ``load_only()``, ``defer()`` and ``deferred=True``.

    A property takes the options of a query from the one method above; nothing public makes it ignore them.
    """
    assert isinstance(version, ColumnProperty)
    plain: Any = type(version)
    if not issubclass(plain, _LoadedAlways):
        version.__class__ = type(plain.__name__, (_LoadedAlways, plain), {"__slots__": (), "inherit_cache": True})
    version.deferred = False
    version.strategy_key = (("deferred", False), ("instrument", True))


def _check_child(mapper: Mapper[Any], inherited: Any) -> None:
    """Refuse a child with a version of its own: SQLAlchemy would check one and count the other."""
    assert mapper.inherits is not None
    attribute = attribute_of(mapper)
    if attribute != attribute_of(mapper.inherits) or mapper.columns.get(attribute) is not inherited:
        raise TypeError(
            f"{mapper.class_.__name__} has a version of its own, but inherits that of {mapper.inherits.class_.__name__}; "
            "leave the mixin, the column and __version_attr__ to the parent"
        )


def _column(mapper: Mapper[Any], model: type[VersionMixin]) -> Column[Any]:
    name = model.__version_attr__
    table: Any = mapper.local_table
    can_grow = isinstance(mapper.local_table, Table)
    if can_grow and not mapper.has_property(name) and not _excluded(mapper, name):
        column: Any = table.columns.get(name)
        if column is None:
            column = model.__version_kind__.column(name).column
            table.append_column(column)
        mapper.add_property(name, column)
    mapped = mapper.columns.get(name)
    if mapped is None:
        raise TypeError(
            f"{model.__name__} has a version mixin but does not map {name!r} to a column; take it out of "
            "exclude_properties, or name the attribute in __version_attr__"
        )
    if mapped.table is not table:
        raise TypeError(
            f"{model.__name__} maps {name!r} to a column of another table, {mapped.table}; map it to its own"
        )
    return mapped


def _excluded(mapper: Mapper[Any], name: str) -> bool:
    sets: Any = mapper  # SQLAlchemy gives these no types
    excluded: Collection[str] = sets.exclude_properties or ()
    included: Collection[str] | None = sets.include_properties
    return name in excluded or (included is not None and name not in included)


def _complete(column: Column[Any], kind: VersionKind, model: type[VersionMixin]) -> None:
    """Give a column that the model declares itself what a column of ours has."""
    # The private attribute tells whether somebody has declared the column nullable.
    if column.nullable and column._user_defined_nullable is True:
        raise TypeError(
            f"{model.__name__} maps its version to the nullable column {column.name!r}, and NULL equals no version; "
            "declare it NOT NULL"
        )
    column.nullable = False
    column.info.setdefault(INFO_KEY, kind.name)
    if kind is TIMESTAMP:
        _keep_in_utc(column, model)
    if kind.following is None:
        event.listen(column.table, "before_create", _only_postgresql)
        return
    # A column takes its defaults when it is made; later only like this (SQLAlchemy 2.0.58 and 2.1.9).
    if column.default is None:
        ColumnDefault(kind.first)._set_parent(column)
    if column.server_default is None:
        assert kind.server_default is not None
        DefaultClause(kind.server_default)._set_parent(column)


def _keep_in_utc(column: Column[Any], model: type[VersionMixin]) -> None:
    """Give a column that the model declares itself the type that keeps microseconds and UTC on every database.

    SQLAlchemy's own type returns naive timestamps on MariaDB and SQLite, and whole seconds on MariaDB.

    Raises:
        TypeError: it was declared without a time zone, and PostgreSQL would make another column of it.
    """
    if type(column.type) is not DateTime:
        return
    if not column.type.timezone:
        raise TypeError(
            f"{model.__name__} maps its version to {column.name!r}, which is declared without a time zone; declare it as "
            "mapped_column(DateTime(timezone=True))"
        )
    column.type = UtcTimestamp()


def _only_postgresql(table: Table, connection: Connection, **_: Any) -> None:
    system = recognised(connection)
    if not system.has_xmin:
        raise TypeError(
            f"table {table.name!r} is versioned by xmin, which {system.title} does not have; use Versioned, "
            "VersionedByUUID or VersionedByTimestamp"
        )


def _refuse_assignment(target: VersionMixin, value: Any, old: Any, _initiator: object) -> None:
    """Refuse to assign another version: SQLAlchemy would not check it, but write it into the row."""
    if inspect(target).key is None or value == old:
        return
    raise AttributeError(
        f"the version of {describe(target)} is {old!r} and was assigned {value!r}, which would not check it but set the row "
        "back; call expect_version() to check a client's version, or touch() to count a change"
    )


@event.listens_for(VersionedByXmin, "before_insert", propagate=True)
def _ignore_argument(mapper: Mapper[Any], _connection: Connection, instance: VersionedByXmin) -> None:
    """Ignore a version given to the constructor, as the other kinds do: nobody can write xmin."""
    inspect(instance).dict.pop(attribute_of(mapper), None)
