"""Lazy loads that are refused, those that never are, and what is said where asyncio cannot wait."""

from __future__ import annotations

import gc
import warnings

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError, MissingGreenlet, StatementError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import (
    Session,
    immediateload,
    joinedload,
    selectin_polymorphic,
    selectinload,
    subqueryload,
    with_parent,
)

from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow.errors import LazyLoadError, NPlusOneWarning, UnitOfWorkError
from tests.loads.tables import (
    Book,
    Company,
    Line,
    Manager,
    Node,
    Order,
    Pair,
    Paper,
    Person,
    Post,
    Shelf,
    Staff,
    Tag,
    Trainee,
    User,
    Visitor,
)

two = pytest.mark.drivers("sqlite", "asyncpg")


async def _awaited(_session, instance, name):
    await getattr(instance.awaitable_attrs, name)


async def _in_a_sync_function(session, instance, name):
    await session.run_sync(lambda _session: getattr(instance, name))


async def _plainly(_session, instance, name):
    getattr(instance, name)


@pytest.mark.parametrize("use", [_awaited, _in_a_sync_function, _plainly], ids=lambda use: use.__name__)
async def test_a_relationship_is_refused_before_anything_is_sent(blog, unit, use):
    """However the attribute is used, the error names it and the option, and the unit goes on to commit."""
    async with unit("raise") as work:
        user = await work.session.get_one(User, 1)
        work.session.add(Pair(one=1, two=1))
        with pytest.raises(LazyLoadError) as raised:
            await use(work.session, user, "posts")
    assert str(raised.value) == (
        "User.posts is not loaded, and begin() refuses lazy loads; add .options(selectinload(User.posts)) to the "
        "statement that loads User, or await session.refresh(user, ['posts']) first"
    )
    assert (raised.value.attribute, raised.value.option) == ("User.posts", "selectinload(User.posts)")
    assert isinstance(raised.value, UnitOfWorkError)
    assert isinstance(raised.value, InvalidRequestError)  # as that of raiseload() is
    assert work.status.value == "committed"
    assert await blog.scalar("SELECT count(*) FROM blog_pair") == 1


@two
async def test_a_deferred_column_is_refused(unit):
    """A column that is loaded object by object is the same loop."""
    async with unit("raise") as work:
        user = await work.session.get_one(User, 1)
        with pytest.raises(LazyLoadError) as raised:
            await user.awaitable_attrs.bio
    assert str(raised.value) == (
        "User.bio is not loaded, and begin() refuses lazy loads; add .options(undefer(User.bio)) to the "
        "statement that loads User, or await session.refresh(user, ['bio']) first"
    )
    assert raised.value.option == "undefer(User.bio)"


@two
async def test_the_read_session_of_a_scope_refuses(blog):
    """Outside any unit it is the same."""
    async with UnitOfWorkManager(blog.blog, lazy_loads="raise").scope():
        user = await current_session().get_one(User, 1)
        with pytest.raises(LazyLoadError, match="the read session of this scope refuses lazy loads"):
            await user.awaitable_attrs.posts


# -- the option


async def _tree(session):
    session.add(Node(id=1, children=[Node(id=2, children=[Node(id=3)])]))
    await session.flush()
    session.expunge_all()
    statement = select(Node).where(Node.id == 1).options(selectinload(Node.children).selectinload(Node.children))
    node = (await session.scalars(statement)).one()
    await node.children[0].children[0].awaitable_attrs.children


async def _subclass(session):
    session.add(Company(id=1, people=[Manager(id=1)]))
    await session.flush()
    session.expunge_all()
    company = (await session.scalars(select(Company).options(selectinload(Company.people)))).one()
    await company.people[0].awaitable_attrs.papers


async def _new(session):
    session.add(user := User(id=50))
    await session.flush()
    session.expire(user, ["posts"])
    await user.awaitable_attrs.posts


@two
@pytest.mark.parametrize(
    ("load", "option"),
    [
        (_tree, "selectinload(Node.children, recursion_depth=-1)"),
        (_subclass, "selectinload(Company.people.of_type(Manager)).selectinload(Manager.papers)"),
        (_new, "selectinload(User.posts)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_the_option_begins_at_the_users_statement(unit, load, option):
    """A tree, a subclass on the way, and an object that no statement loaded."""
    with pytest.raises(LazyLoadError) as raised:
        async with unit("raise") as work:
            await load(work.session)
    assert raised.value.option == option


@two
async def test_the_option_for_a_subclass_is_right(unit):
    """What the error names for a subclass on the way can be written so, and then nothing is loaded lazily."""
    with pytest.raises(LazyLoadError):
        async with unit("raise") as work:
            await _subclass(work.session)
    async with unit("raise") as work:
        work.session.add(Company(id=1, people=[Manager(id=1, papers=[Paper(id=1)])]))
        await work.session.flush()
        work.session.expunge_all()
        option = selectinload(Company.people.of_type(Manager)).selectinload(Manager.papers)
        company = (await work.session.scalars(select(Company).options(option))).one()
        assert [paper.id for paper in company.people[0].papers] == [1]


# -- a subclass's columns, and a session class of the user's own


async def _of_a_base(session):
    session.add(Staff(id=1, company_id=None, room="a", phone="b"))
    await session.flush()
    session.expunge_all()
    return (await session.scalars(select(Person))).one()


async def _on_a_path(session):
    session.add(Company(id=1, people=[Staff(id=1)]))
    await session.flush()
    session.expunge_all()
    return (await session.scalars(select(Company).options(selectinload(Company.people)))).one().people[0]


@pytest.mark.parametrize(
    ("load", "attribute", "option"),
    [
        (_of_a_base, "room", "selectin_polymorphic(Person, [Staff])"),
        (_of_a_base, "phone", "selectin_polymorphic(Person, [Staff])"),
        (_on_a_path, "room", "selectinload(Company.people).selectin_polymorphic([Staff])"),
    ],
)
async def test_a_column_of_a_subclass_is_refused(blog, unit, load, attribute, option):
    """A statement of the base leaves it out; it never was loaded, and what the error names loads it."""
    async with unit("raise") as work:
        staff = await load(work.session)
        with pytest.raises(LazyLoadError) as raised:
            await getattr(staff.awaitable_attrs, attribute)
        with pytest.raises(LazyLoadError) as at_once:
            getattr(staff, attribute)
    assert str(at_once.value) == str(raised.value)
    assert str(raised.value).startswith(
        f"Staff.{attribute} is not loaded, and begin() refuses lazy loads; add .options({option})"
    )
    assert str(raised.value).endswith(f"or await session.refresh(staff, ['{attribute}']) first")
    assert raised.value.option == option
    statement = select(Company if load is _on_a_path else Person)
    names = {"Person": Person, "Staff": Staff, "Company": Company}
    told = eval(option, {"selectin_polymorphic": selectin_polymorphic, "selectinload": selectinload, **names})  # noqa: S307  # our own text
    async with unit("raise") as work:
        loaded = (await work.session.scalars(statement.options(told))).one()
        staff = loaded.people[0] if load is _on_a_path else loaded
        assert [staff.room, staff.phone] == (["", ""] if load is _on_a_path else ["a", "b"])


@two
async def test_a_column_of_a_subclass_that_was_expired(blog, unit):
    """It was loaded, by a refresh or with its class: it is loaded again, as every expired attribute."""
    async with unit("raise") as work:
        await _of_a_base(work.session)
        staff = await work.session.get_one(Person, 1)
        await work.session.refresh(staff, ["room", "phone"])
        assert [staff.room, staff.phone] == ["a", "b"]
        work.session.expire(staff, ["room"])
        assert await staff.awaitable_attrs.room == "a"
        work.session.expire(staff)
        assert await staff.awaitable_attrs.phone == "b"


@two
async def test_what_a_flush_has_expired(blog, unit):
    """What the database makes up of a subclass's columns is loaded, as ever: by the INSERT and by an UPDATE."""
    async with unit("raise") as work:
        work.session.add(visitor := Visitor(id=1))
        await work.session.flush()
        assert await visitor.awaitable_attrs.badge == "new"
        assert await visitor.awaitable_attrs.seen == "0"
        visitor.badge = "old"
        await work.session.flush()
        assert await visitor.awaitable_attrs.seen == "x"
        work.session.expunge_all()
        visitor = (await work.session.scalars(select(Visitor))).one()
        visitor.badge = "older"
        await work.session.flush()
        assert await visitor.awaitable_attrs.seen == "x"


@two
async def test_columns_of_a_single_table(blog, unit):
    """Likewise where a subclass has no table of its own."""
    async with unit("raise") as work:
        work.session.add(Trainee(id=1, mentor="m"))
        await work.session.flush()
        work.session.expunge_all()
        person = (await work.session.scalars(select(Person))).one()
        with pytest.raises(LazyLoadError) as raised:
            await person.awaitable_attrs.mentor
    assert raised.value.option == "selectin_polymorphic(Person, [Trainee])"


class Own(Session):
    """As SQLModel's: each way to send a statement is its own."""

    def execute(self, *arguments, **options):
        return super().execute(*arguments, **options)

    def scalars(self, *arguments, **options):
        return super().scalars(*arguments, **options)


def traced(function):
    """Stand for what a tracer puts around a method."""

    def around(*arguments, **options):
        return function(*arguments, **options)

    return around


class Traced(Own):
    execute = traced(Own.execute)


@pytest.mark.parametrize("own", [Own, Traced])
async def test_a_session_class_of_the_users(blog, own):
    """Its own execute() hides nothing: what is refused, what is not, and what a warning names is as ever."""
    made = async_sessionmaker(blog.blog, sync_session_class=own)
    async with UnitOfWorkManager(made, lazy_loads="raise").begin() as work:
        users = (await work.session.scalars(select(User).options(selectinload(User.posts)))).all()
        assert len(users[1].posts) == 1
        with pytest.raises(LazyLoadError, match=r"User\.bio is not loaded"):
            await users[1].awaitable_attrs.bio
        with pytest.raises(LazyLoadError, match=r"Post\.tags is not loaded"):
            await users[1].posts[0].awaitable_attrs.tags
        await work.session.refresh(users[1], ["bio"])
        count = await work.session.run_sync(lambda session: len(session.scalars(select(User)).all()))
        assert count == len(users)
    with pytest.warns(NPlusOneWarning, match=r"User\.posts was loaded 11 times"):
        await _one_by_one(UnitOfWorkManager(made, lazy_loads="warn"))


async def _one_by_one(manager):
    async with manager.begin() as work:
        for user in (await work.session.scalars(select(User))).all():
            await user.awaitable_attrs.posts


# -- never refused


async def _options(session):
    await session.run_sync(lambda session: session.expunge_all())
    for option in (selectinload, joinedload, subqueryload, immediateload):
        session.expunge_all()
        user = (await session.scalars(select(User).where(User.id == 1).options(option(User.posts)))).unique().one()
        assert len(user.posts) == 1


async def _refresh(session):
    user = await session.get_one(User, 1)
    await session.refresh(user, ["posts", "bio"])
    assert (len(user.posts), user.bio) == (1, "")


async def _expired(session):
    user = await session.get_one(User, 1)
    session.expire(user)
    assert await user.awaitable_attrs.name == "u1"


async def _mapped(session):
    session.add(Shelf(id=1))
    await session.flush()
    session.add(Book(id=1, shelf_id=1))
    await session.flush()
    session.expunge_all()
    shelf = (await session.scalars(select(Shelf))).unique().one()
    assert [len(shelf.selected), len(shelf.joined)] == [1, 1]
    assert len((await session.scalars(shelf.written.select())).all()) == 1
    assert await session.run_sync(lambda _session: shelf.followed.count()) == 1
    assert len(await session.run_sync(lambda _session: shelf.followed.all())) == 1
    with pytest.raises(InvalidRequestError, match=r"'Shelf\.guarded' is not available due to lazy='raise'"):
        await shelf.awaitable_attrs.guarded


async def _known(session):
    users = (await session.scalars(select(User))).all()
    posts = (await session.scalars(select(Post))).all()
    assert {await post.awaitable_attrs.user for post in posts} == set(users)  # from the identity map
    assert (await session.scalars(select(Post).where(with_parent(users[1], User.posts)))).one().id == 1


async def _polymorphic(session):
    session.add(Company(id=1, people=[Manager(id=1, title="boss")]))
    await session.flush()
    session.expunge_all()
    company = (await session.scalars(select(Company).options(selectinload(Company.people)))).one()
    assert company.people[0].title == "boss"


async def _merge(session):
    merged = await session.merge(User(id=1, name="merged", posts=[Post(id=1, text="x")]))
    assert len(merged.posts) == 1


async def _cascades(session):
    await session.delete(await session.get_one(User, 1))  # its posts, and their tags
    await session.flush()
    assert (await session.get(Post, 1), await session.get(Tag, 1)) == (None, None)


async def _backrefs(session):
    user, post = await session.get_one(User, 1), await session.get_one(Post, 2)
    post.user = user  # moves it; neither collection is loaded
    session.add(Post(id=100, user=user))
    await session.flush()
    assert len((await session.scalars(select(Post).where(Post.user_id == 1))).all()) == 3


async def _versions(session):
    session.add(Order(id=1, lines=[Line(id=1)]))
    session.add(Order(id=2))
    await session.flush()
    session.expunge_all()
    line = await session.get_one(Line, 1)
    line.amount, line.order_id = 5, 2
    await session.flush()
    rows = await session.execute(select(Order.id, Order.version).order_by(Order.id))
    assert [tuple(row) for row in rows] == [(1, 2), (2, 2)]


ALLOWED = [_options, _refresh, _expired, _mapped, _known, _polymorphic, _merge, _cascades, _backrefs, _versions]


@two
@pytest.mark.parametrize("work", ALLOWED, ids=lambda work: work.__name__)
async def test_what_was_asked_for_and_what_a_flush_needs_is_loaded(unit, work):
    """Loader options, refresh, mappings, the identity map, merge, cascades and versions work as in any session."""
    async with unit("raise") as begun:
        await work(begun.session)


@two
async def test_a_listener_in_a_flush_may_load(unit):
    """In a flush SQLAlchemy loads what it needs, and so may the application's listeners to it."""
    seen = []

    def before_update(_mapper, _connection, user):
        seen.append(len(user.posts))

    event.listen(User, "before_update", before_update)
    try:
        async with unit("raise") as work:
            user = await work.session.get_one(User, 1)
            user.name = "changed"
    finally:
        event.remove(User, "before_update", before_update)
    assert seen == [1]


# -- where asyncio cannot wait


@pytest.fixture
def _nobody_awaits():
    """Let go, unheard, of the coroutine that SQLAlchemy 2.1 makes of an aiosqlite cursor before it finds no greenlet."""
    yield
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine '.*cursor' was never awaited", RuntimeWarning)
        gc.collect()


NOT_LOADED = (
    "User.{0} is not loaded, {why}; add .options({1}(User.{0})) to the statement that loads User, or {refresh} first"
)
WITHOUT = [
    ("posts", NOT_LOADED, "selectinload"),
    ("bio", NOT_LOADED, "undefer"),
    ("name", "User.{0} is expired, {why}; {refresh} first", None),
]


def _said(name, message, option):
    why = "and an attribute cannot wait for the database"
    return message.format(name, option, why=why, refresh=f"await session.refresh(user, [{name!r}])")


async def _missing(session, name):
    user = await session.get_one(User, 1)
    session.add(Pair(one=1, two=1))
    await session.flush()
    if name == "name":
        session.expire(user)
    return user


@pytest.mark.usefixtures("_nobody_awaits")
@pytest.mark.parametrize(("name", "message", "option"), WITHOUT)
async def test_an_attribute_that_cannot_wait_is_named(blog, unit, name, message, option):
    """Instead of "greenlet_spawn has not been called" it is said what is not loaded, also where lazy loads are allowed."""
    with pytest.raises(LazyLoadError) as raised:
        async with unit("allow") as work:
            getattr(await _missing(work.session, name), name)
    assert str(raised.value) == _said(name, message, option)
    assert raised.value.attribute == f"User.{name}"
    assert raised.value.option == (option and f"{option}(User.{name})")
    assert isinstance(raised.value.__cause__, MissingGreenlet)
    assert await blog.scalar("SELECT count(*) FROM blog_pair") == 0


@pytest.mark.parametrize(("name", "message", "option"), WITHOUT)
async def test_it_is_found_before_the_driver_where_loads_are_counted(blog, unit, name, message, option):
    """There the driver is not asked, and the unit goes on to commit."""
    async with unit("warn") as work:
        user = await _missing(work.session, name)
        with pytest.raises(LazyLoadError) as raised:
            getattr(user, name)
    assert str(raised.value) == _said(name, message, option)
    assert await blog.scalar("SELECT count(*) FROM blog_pair") == 1


@pytest.mark.drivers("asyncpg", "asyncmy")  # not aiosqlite, whose cursor nobody awaits then
@pytest.mark.parametrize("mode", ["allow", "warn"])
async def test_a_statement_that_nobody_awaits_is_no_lazy_load(unit, mode):
    """It is SQLAlchemy's own error, as ever."""
    with pytest.raises((MissingGreenlet, StatementError), match="greenlet_spawn has not been called"):
        async with unit(mode) as work:
            await work.session.get_one(User, 1)
            work.session.sync_session.execute(select(User))


@two
async def test_other_errors_stay_what_they_are(unit):
    """A constraint's is the driver's."""
    with pytest.raises(IntegrityError):
        async with unit("allow") as work:
            await work.session.execute(insert(User.__table__).values(id=1, name="", bio=""))


# -- the option of the manager


async def test_a_mode_that_is_none(blog):
    """What is no mode is refused where the manager is made."""
    with pytest.raises(ValueError, match="unknown") as raised:
        UnitOfWorkManager(blog.blog, lazy_loads="forbid")
    assert str(raised.value) == (
        "UnitOfWorkManager 'default' has lazy_loads='forbid', which is unknown; use 'allow', 'warn' or 'raise'"
    )
    assert UnitOfWorkManager(blog.blog).lazy_loads == "allow"
