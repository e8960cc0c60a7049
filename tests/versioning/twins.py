"""Models twice, with a version and without, and statements of the ORM that are to do the same to both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    ForeignKey,
    String,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, load_only, mapped_column, registry, with_loader_criteria

if TYPE_CHECKING:
    from collections.abc import Callable


def twins(*mixins: type, prefix: str) -> SimpleNamespace:
    """Map the models with these mixins, or with none.

    No column `other` is in any statement of this module: it is what somebody else changes.
    """

    class Base(DeclarativeBase):
        registry = registry()

    class Doc(*mixins, Base):
        __tablename__ = f"{prefix}doc"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        name: Mapped[str] = mapped_column(String(20))
        n: Mapped[int] = mapped_column(default=0)
        other: Mapped[int] = mapped_column(default=0)
        note: Mapped[str | None] = mapped_column(String(20))
        edited: Mapped[str | None] = mapped_column(String(20), onupdate=lambda: "python")
        seen: Mapped[str | None] = mapped_column(String(20), onupdate=lambda context: context.dialect.name)
        stamp: Mapped[str | None] = mapped_column(String(20), onupdate="constant")
        shout: Mapped[str | None] = mapped_column(String(20), onupdate=func.upper("sql"))

    class Item(*mixins, Base):
        __tablename__ = f"{prefix}item"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        kind: Mapped[str] = mapped_column(String(10))
        name: Mapped[str] = mapped_column(String(20))
        other: Mapped[int] = mapped_column(default=0)
        edited: Mapped[str | None] = mapped_column("item_edited", String(20), onupdate=lambda: "item")
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}

    class Part(Item):
        __tablename__ = f"{prefix}part"
        id: Mapped[int] = mapped_column(ForeignKey(Item.id), primary_key=True, autoincrement=False)
        size: Mapped[int] = mapped_column(default=0)
        label: Mapped[str | None] = mapped_column(String(20))
        touched: Mapped[str | None] = mapped_column(String(20), onupdate=lambda: "python")
        seen: Mapped[str | None] = mapped_column(String(20), onupdate=lambda context: context.dialect.name)
        stamp: Mapped[str | None] = mapped_column(String(20), onupdate="constant")
        shout: Mapped[str | None] = mapped_column(String(20), onupdate=func.upper("sql"))
        __mapper_args__ = {"polymorphic_identity": "part"}

    class Key(*mixins, Base):
        __tablename__ = f"{prefix}key"
        left: Mapped[str] = mapped_column(String(20), primary_key=True)
        right: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        other: Mapped[int] = mapped_column(default=0)
        n: Mapped[int] = mapped_column(default=0)

    return SimpleNamespace(Base=Base, Doc=Doc, Item=Item, Part=Part, Key=Key)


def rows_of(m: SimpleNamespace) -> list[object]:
    """Return the objects that each statement begins with."""
    docs = [m.Doc(id=key, name=name, n=key * 10) for key, name in enumerate(("ann", "Bob", "cid", "dee"), 1)]
    items = [m.Item(id=1, name="a"), m.Item(id=2, name="b")]
    parts = [m.Part(id=key, name=name, size=key) for key, name in ((3, "c"), (4, "d"), (5, "b"))]
    keys = [m.Key(left="abc", right=1), m.Key(left="abc", right=2), m.Key(left="xyz", right=1)]
    return [*docs, *items, *parts, *keys]


class Case(NamedTuple):
    """A statement, and how it is executed.

    Attributes:
        name: of the test.
        of: makes the statement.
        params: given to ``execute()``.
        options: of the execution.
        families: of databases that have it.
        event: of the session, in which it is executed while an object is flushed; None for by itself.
        undefined: which rows it changes is the database's to choose; only their number is compared.
        stale: it is refused by the version, whether or not the driver counts rows well enough for the twin to be.
    """

    name: str
    of: Callable[[SimpleNamespace], Any]
    params: Any = None
    options: dict[str, Any] = {}  # a default that nobody changes
    families: tuple[str, ...] = ("sqlite", "postgresql", "mysql")
    event: str | None = None
    undefined: bool = False
    stale: bool = False


RETURNING = ("sqlite", "postgresql")
FETCH = {"synchronize_session": "fetch"}
EVALUATE = {"synchronize_session": "evaluate"}
NOT = {"synchronize_session": False}


def limited(statement: Any) -> Any:
    """Return an UPDATE of two rows at most."""
    return statement.with_dialect_options(mysql_limit=2)


def of_alias(other: Any) -> Any:
    """Return an UPDATE under another name."""
    if hasattr(other, "size"):
        return update(other).where(other.size > 3).values(size=1)
    return update(other).where(other.n > 10).values(n=5)


def upsert(m: SimpleNamespace, insert_: Any, values: dict[str, Any]) -> Any:
    """Return an INSERT of a new row and of one that is there, whose `n` is set then."""
    statement = insert_(m.Doc).values([{"id": 1, **values}, {"id": 9, **values}])
    set_ = {"n": 77, **m.next_version(m.Doc)}
    if insert_ is mysql.insert:
        return statement.on_duplicate_key_update(**set_)
    return statement.on_conflict_do_update(index_elements=["id"], set_=set_)


CASES = [
    # -- one table
    Case("where", lambda m: update(m.Doc).where(m.Doc.n >= 20).values(n=m.Doc.n + 1)),
    Case("where, fetch", lambda m: update(m.Doc).where(m.Doc.n >= 20).values(n=m.Doc.n + 1), options=FETCH),
    Case("where, evaluate", lambda m: update(m.Doc).where(m.Doc.n >= 20).values(n=m.Doc.n + 1), options=EVALUATE),
    Case("where, no sync", lambda m: update(m.Doc).where(m.Doc.n >= 20).values(n=m.Doc.n + 1), options=NOT),
    Case("all rows", lambda m: update(m.Doc).values(note="all")),
    Case("no row", lambda m: update(m.Doc).where(m.Doc.id == 99).values(note="none")),
    Case("params", lambda m: update(m.Doc).where(m.Doc.id == 2), params={"note": "given"}),
    Case("bindparam in where", lambda m: update(m.Doc).where(m.Doc.id == bindparam("x")).values(n=1), params={"x": 1}),
    Case("bindparam in values", lambda m: update(m.Doc).where(m.Doc.id == 1).values(n=bindparam("x")), params={"x": 7}),
    Case("ordered", lambda m: update(m.Doc).where(m.Doc.id == 3).ordered_values((m.Doc.n, 5), (m.Doc.note, "x"))),
    Case("alias", lambda m: of_alias(aliased(m.Doc))),
    Case("alias, fetch", lambda m: of_alias(aliased(m.Doc)), options=FETCH),
    Case("alias, no sync", lambda m: of_alias(aliased(m.Doc)), options=NOT),
    Case("collation", lambda m: update(m.Doc).where(m.Doc.name == "ANN").values(n=5)),
    Case("collation, evaluate", lambda m: update(m.Doc).where(m.Doc.name == "bob").values(n=5), options=EVALUATE),
    Case("padding", lambda m: update(m.Doc).where(m.Doc.name == "ann  ").values(n=5)),
    Case("text compared", lambda m: update(m.Doc).where(text("name = 'BOB'")).values(n=5)),
    Case("function", lambda m: update(m.Doc).where(func.lower(m.Doc.name) == "bob").values(note=func.upper("x"))),
    Case("null", lambda m: update(m.Doc).where(m.Doc.note.is_(None), m.Doc.n != 10).values(note="was null")),
    Case("null compared", lambda m: update(m.Doc).where(m.Doc.note != "x").values(n=0)),
    Case("or, between", lambda m: update(m.Doc).where(or_(m.Doc.n.between(5, 15), m.Doc.name == "dee")).values(n=3)),
    Case("in", lambda m: update(m.Doc).where(m.Doc.id.in_([1, 4, 9])).values(n=3)),
    Case("in a subquery", lambda m: update(m.Doc).where(m.Doc.id.in_(select(m.Part.id))).values(n=3)),
    Case("exists", lambda m: update(m.Doc).where(exists().where(m.Item.id == m.Doc.id)).values(n=3)),
    Case("case", lambda m: update(m.Doc).values(n=case((m.Doc.id == 1, 100), else_=m.Doc.n))),
    Case(
        "subquery in values",
        lambda m: update(m.Doc).values(
            note=select(m.Item.name).where(m.Item.id == m.Doc.id).limit(1).scalar_subquery()
        ),
    ),
    Case("from another table", lambda m: update(m.Doc).where(m.Doc.id == m.Item.id, m.Item.name == "b").values(n=3)),
    Case("limit", lambda m: limited(update(m.Doc).values(n=4)), families=("mysql",), undefined=True),
    Case("its own values", lambda m: update(m.Doc).where(m.Doc.id == 1).values(edited="mine", stamp=None)),
    Case("loader criteria", lambda m: update(m.Doc).values(n=3).options(with_loader_criteria(m.Doc, m.Doc.n < 25))),
    Case(
        "loader criteria, fetch",
        lambda m: update(m.Doc).values(n=3).options(with_loader_criteria(m.Doc, m.Doc.n < 25)),
        options=FETCH,
    ),
    Case("same values", lambda m: update(m.Doc).where(m.Doc.id == 1).values(n=10)),
    Case("unknown column", lambda m: update(m.Doc).values(nothing=1)),
    Case("null where none may be", lambda m: update(m.Doc).where(m.Doc.id == 1).values(name=None)),
    Case("the key", lambda m: update(m.Doc).where(m.Doc.id == 4).values(id=44), options=NOT),
    Case(
        "returning columns",
        lambda m: update(m.Doc).where(m.Doc.id < 3).values(n=1).returning(m.Doc.id, m.Doc.edited),
        families=RETURNING,
    ),
    Case(
        "returning objects",
        lambda m: update(m.Doc).where(m.Doc.id < 3).values(n=1).returning(m.Doc),
        options={"populate_existing": True},
        families=RETURNING,
    ),
    Case(
        "returning objects in part",
        lambda m: update(m.Doc).where(m.Doc.id < 3).values(n=1).returning(m.Doc).options(load_only(m.Doc.n)),
        families=RETURNING,
    ),
    Case(
        "many by where",
        lambda m: update(m.Doc).where(m.Doc.id == bindparam("i")).values(n=bindparam("x")),
        params=[{"i": 1, "x": 5}, {"i": 2, "x": 6}],
        options={"dml_strategy": "orm", "synchronize_session": False},
    ),
    Case("core only", lambda m: update(m.Doc).where(m.Doc.id == 99).values(n=1), options={"dml_strategy": "core_only"}),
    Case("cte", lambda m: update(m.Doc).where(m.Doc.id.in_(select(select(m.Item.id).cte("c").c.id))).values(n=2)),
    # -- lists by key
    Case("list", lambda m: update(m.Doc), params=[{"id": 1, "n": 1}, {"id": 3, "n": 3}]),
    Case("list, no sync", lambda m: update(m.Doc), params=[{"id": 1, "n": 1}, {"id": 3, "n": 3}], options=NOT),
    Case("list of different columns", lambda m: update(m.Doc), params=[{"id": 1, "n": 1}, {"id": 3, "note": "x"}]),
    Case("empty list", lambda m: update(m.Doc), params=[]),
    Case("list with a key twice", lambda m: update(m.Doc), params=[{"id": 1, "n": 1}, {"id": 1, "note": "x"}]),
    Case("list with a missing row", lambda m: update(m.Doc), params=[{"id": 1, "n": 1}, {"id": 99, "n": 1}], stale=True),
    Case("list without a key", lambda m: update(m.Doc), params=[{"n": 1}]),
    Case("list of composite keys", lambda m: update(m.Key), params=[{"left": "abc", "right": 2, "n": 1}]),
    Case("list of a key of another case", lambda m: update(m.Key), params=[{"left": "ABC", "right": 2, "n": 1}]),
    Case("list of part of a key", lambda m: update(m.Key), params=[{"left": "abc", "n": 1}]),
    Case("list of children", lambda m: update(m.Part), params=[{"id": 3, "size": 30}, {"id": 4, "name": "new"}]),
    Case("list with where", lambda m: update(m.Doc).where(m.Doc.n == 10), params=[{"id": 1, "n": 1}]),
    Case("tuples", lambda m: update(m.Key).where(tuple_(m.Key.left, m.Key.right).in_([("abc", 1)])).values(n=1)),
    # -- joined children
    Case("child", lambda m: update(m.Part).where(m.Part.size > 3).values(size=m.Part.size + 1)),
    Case("child, fetch", lambda m: update(m.Part).where(m.Part.size > 3).values(size=m.Part.size + 1), options=FETCH),
    Case("child, evaluate", lambda m: update(m.Part).where(m.Part.size > 3).values(label="x"), options=EVALUATE),
    Case("child, no sync", lambda m: update(m.Part).where(m.Part.size > 3).values(label="x"), options=NOT),
    Case("child, bindparam", lambda m: update(m.Part).where(m.Part.id == bindparam("x")).values(size=0), params={"x": 3}),
    Case("child, params", lambda m: update(m.Part).where(m.Part.id == 3), params={"label": "given"}),
    Case("child, by key of the parent", lambda m: update(m.Part).where(m.Part.id.in_([3, 5])).values(size=9)),
    Case("child, ordered", lambda m: update(m.Part).ordered_values((m.Part.size, 5), (m.Part.label, "x"))),
    Case("child, subquery on the parent", lambda m: update(m.Part).values(
        label=select(m.Item.name).where(m.Item.id == m.Part.id).correlate(m.Part).scalar_subquery()
    )),
    Case("child, subquery on the parent's table", lambda m: update(m.Part).values(
        label=select(m.Item.__table__.c.name)
        .where(m.Item.__table__.c.id == m.Part.__table__.c.id).scalar_subquery()
    )),
    Case("child, exists on the parent's table", lambda m: update(m.Part).where(
        exists().where(m.Item.__table__.c.id == m.Part.__table__.c.id, m.Item.__table__.c.name == "d")
    ).values(size=0)),
    Case("child, exists on another table", lambda m: update(m.Part).where(exists().where(m.Doc.id == m.Part.id)).values(size=0)),
    Case("child, in a subquery", lambda m: update(m.Part).where(
        m.Part.id.in_(select(m.Item.__table__.c.id).where(m.Item.__table__.c.name == "b"))
    ).values(size=0)),
    Case("child, from another table", lambda m: update(m.Part).where(m.Part.id == m.Doc.id, m.Doc.n > 30).values(size=0)),
    Case("child, limit", lambda m: limited(update(m.Part).values(size=0)), families=("mysql",), undefined=True),
    Case("child, limit, fetch", lambda m: limited(update(m.Part).where(m.Part.size > 3).values(size=0)), families=("mysql",), options=FETCH),
    Case("child, loader criteria", lambda m: update(m.Part).values(size=0).options(
        with_loader_criteria(m.Part, m.Part.size < 5)
    )),
    Case("child, loader criteria, fetch", lambda m: update(m.Part).values(size=0).options(
        with_loader_criteria(m.Part, m.Part.size < 5)
    ), options=FETCH),
    Case("child, its own values", lambda m: update(m.Part).where(m.Part.id == 3).values(touched="mine")),
    Case("child, returning", lambda m: update(m.Part).where(m.Part.size > 3).values(size=1).returning(m.Part.id), families=RETURNING),
    Case("child, column of the parent", lambda m: update(m.Part).where(m.Part.id == 3).values(name="x")),
    Case("child, collation", lambda m: update(m.Part).where(m.Part.label == "NONE").values(size=1)),
    Case("parent", lambda m: update(m.Item).where(m.Item.name == "b").values(name="z")),
    Case("parent, of one class", lambda m: update(m.Item).where(m.Item.kind == "part").values(name="z"), options=FETCH),
    Case("child, alias", lambda m: of_alias(aliased(m.Part, flat=True))),
    # -- INSERT and DELETE
    Case("insert", lambda m: insert(m.Doc).values(id=9, name="new")),
    Case("insert a list", lambda m: insert(m.Doc), params=[{"id": 8, "name": "x"}, {"id": 9, "name": "y"}]),
    Case("insert a list of children", lambda m: insert(m.Part), params=[{"id": 8, "name": "x"}, {"id": 9, "name": "y"}]),
    Case("insert returning", lambda m: insert(m.Doc).values(id=9, name="new").returning(m.Doc), families=RETURNING),
    Case("insert what is there", lambda m: insert(m.Doc).values(id=1, name="new")),
    Case("insert from select", lambda m: insert(m.Key).from_select(
        ["left", "right", "n", "other"], select(m.Doc.name, m.Doc.id, m.Doc.n, literal(0))
    )),
    Case("upsert", lambda m: upsert(m, postgresql.insert, {"name": "x"}), families=("postgresql",)),
    Case("upsert", lambda m: upsert(m, sqlite.insert, {"name": "x"}), families=("sqlite",)),
    Case("upsert", lambda m: upsert(m, mysql.insert, {"name": "x"}), families=("mysql",)),
    Case("delete", lambda m: delete(m.Doc).where(m.Doc.n > 25)),
    Case("delete, fetch", lambda m: delete(m.Doc).where(m.Doc.n > 25), options=FETCH),
    Case("delete, loader criteria", lambda m: delete(m.Doc).options(with_loader_criteria(m.Doc, m.Doc.n > 25))),
    Case("delete returning", lambda m: delete(m.Doc).where(m.Doc.n > 25).returning(m.Doc.id), families=RETURNING),
    Case("delete a list", lambda m: delete(m.Doc), params=[{"id": 1}]),
    Case("delete nothing", lambda m: delete(m.Doc).where(m.Doc.id == 99)),
    # -- in events of a flush
    *(
        Case(f"in {name}", lambda m: update(m.Doc).where(m.Doc.id == 1).values(n=m.Doc.n + 1), event=name)
        for name in ("before_flush", "after_flush", "after_flush_postexec", "before_insert", "after_insert")
    ),
    Case("child, in after_flush", lambda m: update(m.Part).where(m.Part.id == 3).values(size=7), event="after_flush"),
    Case("list, in after_flush", lambda m: update(m.Doc), params=[{"id": 1, "n": 5}], event="after_flush"),
    Case("in do_orm_execute's criteria", lambda m: update(m.Part).values(size=0), event="do_orm_execute"),
]  # fmt: skip
