"""The same SELECT again and again in one unit: what is told, where, and when nothing is."""

from __future__ import annotations

import asyncio
import warnings

import pytest
from sqlalchemy import ColumnElement, Integer, event, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import immediateload, joinedload, selectinload, subqueryload, undefer

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.errors import NPlusOneWarning
from sqla_uow.testing import count_queries, rolled_back
from tests.loads.conftest import COUNT
from tests.loads.tables import Pair, Post, Shelf, User

two = pytest.mark.drivers("sqlite", "asyncpg")
TO_USER = " to the statement that loads User"


async def _relationships(session):
    for user in await session.scalars(select(User)):
        await user.awaitable_attrs.posts  # here


async def _in_a_sync_function(session):
    def read(session):
        for user in session.scalars(select(User)):
            assert len(user.posts) == 1  # here

    await session.run_sync(read)


async def _nested(session):
    for user in await session.scalars(select(User).options(selectinload(User.posts))):
        for post in user.posts:
            await post.awaitable_attrs.tags  # here


async def _many_to_one(session):
    for post in await session.scalars(select(Post)):
        await post.awaitable_attrs.user  # here


async def _columns(session):
    for user in await session.scalars(select(User)):
        await user.awaitable_attrs.bio  # here


async def _nested_columns(session):
    for user in await session.scalars(select(User).options(selectinload(User.posts))):
        for post in user.posts:
            await post.awaitable_attrs.text  # here


async def _expired(session):
    users = (await session.scalars(select(User))).all()
    session.expire_all()
    for user in users:
        assert await user.awaitable_attrs.name  # here


async def _refreshed(session):
    for user in (await session.scalars(select(User))).all():
        await session.refresh(user)  # here


async def _refreshed_relationships(session):
    for user in (await session.scalars(select(User))).all():
        await session.refresh(user, ["posts"])  # here


async def _keys(session):
    for number in range(COUNT):
        assert await session.get(User, number)  # here


async def _keys_of_two(session):
    for number in range(COUNT):
        assert await session.get(Pair, (number, number)) is None  # here


async def _statements(session):
    for number in range(COUNT):
        assert await session.scalar(select(User).where(User.id == number))  # here


async def _statements_of_core(session):
    for number in range(COUNT):
        await session.scalar(select(User.__table__.c.id).where(User.__table__.c.id == number))  # here


async def _queries(session):
    def read(session):
        for number in range(COUNT):
            session.query(User).filter_by(id=number).one()  # here

    await session.run_sync(read)


class NoKey(ColumnElement[int]):
    """An expression of the user's that says nothing of caching."""

    inherit_cache = False
    type = Integer()


@compiles(NoKey)
def _no_key(_element, _compiler, **_options):
    return "1"


IN = "read all of them with one statement, for example with in_()"
FRESH = ".execution_options(populate_existing=True)"
TOLD = {
    _relationships: ("User.posts was loaded", f"add .options(selectinload(User.posts)){TO_USER}"),
    _in_a_sync_function: ("User.posts was loaded", f"add .options(selectinload(User.posts)){TO_USER}"),
    _nested: ("Post.tags was loaded", f"add .options(selectinload(User.posts).selectinload(Post.tags)){TO_USER}"),
    _many_to_one: ("Post.user was loaded", "add .options(selectinload(Post.user)) to the statement that loads Post"),
    _columns: ("User.bio was loaded", f"add .options(undefer(User.bio)){TO_USER}"),
    _nested_columns: ("Post.text was loaded", f"add .options(defaultload(User.posts).undefer(Post.text)){TO_USER}"),
    _expired: (
        "User was expired and loaded again",
        f"read them with one select(User).where(User.id.in_(...)){FRESH}",
    ),
    _refreshed: ("User was refreshed", f"read them with one select(User).where(User.id.in_(...)){FRESH}"),
    _refreshed_relationships: ("User.posts was refreshed", f"add .options(selectinload(User.posts)){TO_USER}"),
    _keys: ("User was read by its key", "read them with one select(User).where(User.id.in_(...))"),
    _keys_of_two: (
        "Pair was read by its key",
        "read them with one select(Pair).where(tuple_(Pair.one, Pair.two).in_(...))",
    ),
    _statements: ("the same SELECT of User was sent", IN),
    _statements_of_core: ("the same SELECT was sent", IN),
    _queries: ("the same SELECT was sent", IN),
}


@two
@pytest.mark.parametrize("loop", TOLD, ids=lambda loop: loop.__name__)
async def test_a_loop_is_told_of_once_with_its_place_and_what_to_write_instead(unit, here, loop):
    """Twelve loads in a loop give one warning, at the line of the user's loop, with the option spelled out."""
    what, instead = TOLD[loop]
    how = "" if what.endswith("sent") else ", one object at a time"
    with pytest.warns(NPlusOneWarning) as told:
        async with unit("warn") as work:
            await loop(work.session)
    [warning] = told
    assert str(warning.message) == f"{what} 11 times in begin(){how}, at {here(loop)}; {instead}"
    assert f"{warning.filename}:{warning.lineno}" == here(loop)


async def _eagerly(session):
    option = selectinload(User.posts).options(selectinload(Post.tags), undefer(Post.text))
    for user in await session.scalars(select(User).options(option, undefer(User.bio))):
        assert [len(post.tags) for post in user.posts] == [1]
        assert (user.bio, user.posts[0].text) == ("", "")


async def _joined(session):
    for user in (await session.scalars(select(User).options(joinedload(User.posts)))).unique():
        assert len(user.posts) == 1


async def _subqueried(session):
    for user in await session.scalars(select(User).options(subqueryload(User.posts))):
        assert len(user.posts) == 1


async def _immediately(session):
    for user in await session.scalars(select(User).options(immediateload(User.posts))):
        assert len(user.posts) == 1


async def _by_one_statement(session):
    users = (await session.scalars(select(User).where(User.id.in_(range(COUNT))))).all()
    assert len(users) == COUNT  # and they are kept, else the identity map would not
    assert len((await session.execute(select(Pair).where(tuple_(Pair.one, Pair.two).in_([(1, 1)])))).all()) == 0
    for number in range(COUNT):
        assert await session.get(User, number)  # from the identity map


async def _ten(session):
    for user in (await session.scalars(select(User))).all()[:10]:
        await user.awaitable_attrs.posts


async def _by_their_mapping(session):
    for number in range(COUNT):
        session.add(Shelf(id=number))
    await session.flush()
    session.expunge_all()
    for shelf in (await session.scalars(select(Shelf))).unique():
        assert (shelf.selected, shelf.joined) == ([], [])


async def _without_a_key(session):
    for number in range(COUNT):  # SQLAlchemy cannot tell what is compiled here, and knows no key for it
        await session.execute(select(User.id).where(User.id == number).with_only_columns(NoKey()))


FETCH = {"synchronize_session": "fetch"}  # with a SELECT first, on MariaDB


async def _writes(session):
    for number in range(COUNT):
        await session.execute(update(User).where(User.id == number).values(name="new"), execution_options=FETCH)
        session.add(User(id=100 + number))
        await session.flush()


async def _cascades(session):
    for user in (await session.scalars(select(User))).all():
        await session.delete(user)  # loads the posts, one user at a time


@pytest.mark.drivers("sqlite", "asyncpg", "asyncmy")
@pytest.mark.parametrize(
    "loop",
    [
        _eagerly,
        _joined,
        _subqueried,
        _immediately,
        _by_one_statement,
        _by_their_mapping,
        _without_a_key,
        _ten,
        _writes,
        _cascades,
    ],
    ids=lambda loop: loop.__name__,
)
async def test_what_was_asked_for_is_not_told_of(unit, loop):
    """Loader options, ten loads, writes and what their cascades have to load give no warning, in either mode."""
    modes = ["warn"] if loop is _ten else ["warn", "raise"]
    for mode in modes:
        with pytest.raises(KeyError, match="done"):  # rolled back, for the next one
            async with unit(mode) as work:
                await loop(work.session)
                raise KeyError("done")


@two
async def test_allow_loads_and_says_nothing(unit):
    """The default loads lazily, object by object: the positive control of the others."""
    async with unit("allow") as work:
        users = (await work.session.scalars(select(User))).all()
        assert [len(await user.awaitable_attrs.posts) for user in users] == [1] * COUNT
        assert type(work.session.sync_session).__name__ == "UnitSession"


async def test_the_statements_of_a_page(blog):
    """A page of a hundred parents: 101 statements one by one, 2 with the option that the warning names."""
    async with blog.blog.begin() as connection:
        await connection.execute(insert(User), [{"id": number, "name": ""} for number in range(COUNT, 100)])
    manager = UnitOfWorkManager(blog.blog, lazy_loads="warn")

    async def page(*options):
        with count_queries(manager) as sent:
            async with manager.begin(read_only=True) as work:
                users = (await work.session.scalars(select(User).options(*options))).all()
                assert sum([len(await user.awaitable_attrs.posts) for user in users]) == COUNT
        return sent.count

    with pytest.warns(NPlusOneWarning, match=r"selectinload\(User\.posts\)"):
        assert await page() == 101
    assert await page(selectinload(User.posts)) == 2


@pytest.mark.drivers("sqlite")
async def test_a_select_in_many_pieces_is_one(blog, unit):
    """`selectinload` asks for 500 parents at a time; eleven of these are no loop."""
    async with blog.blog.begin() as connection:
        await connection.execute(insert(User), [{"id": number, "name": ""} for number in range(COUNT, 5_600)])
    async with unit("raise") as work:
        users = (await work.session.scalars(select(User).options(selectinload(User.posts)))).all()
        assert len(users) == 5_600


@two
async def test_each_unit_counts_for_itself(blog, here):
    """Six loads in each of two units are none too many; twenty in one are told of once, and in the next unit again."""
    manager = UnitOfWorkManager(blog.blog, lazy_loads="warn")

    @transactional
    async def read(times):
        for number in range(times):
            await current_session().scalar(select(User.name).where(User.id == number))  # here

    with manager.activate():
        await read(6)
        await read(6)
        for _ in range(2):
            with pytest.warns(NPlusOneWarning) as told:
                await read(20)
            [warning] = told
            assert str(warning.message) == (
                f"the same SELECT of User was sent 11 times in read(), at {here(read)}; {IN}"
            )


@two
async def test_a_listener_that_goes_on_with_a_statement_counts_once(unit):
    """A do_orm_execute listener that invokes the statement, as for soft deletes or a cache, makes no two of it."""

    def goes_on(state):
        return state.invoke_statement()

    async with unit("warn") as work:
        event.listen(work.session.sync_session, "do_orm_execute", goes_on)
        for number in range(10):
            assert await work.session.scalar(select(User).where(User.id == number))


@two
async def test_the_read_session_of_a_scope_counts(blog, here):
    """Outside any unit it is the same."""

    async def read():
        for number in range(COUNT):
            await current_session().get(User, number)  # here

    async with UnitOfWorkManager(blog.blog, lazy_loads="warn").scope():
        with pytest.warns(NPlusOneWarning) as told:
            await read()
    assert str(told[0].message) == (
        f"User was read by its key 11 times in the read session of this scope, one object at a time, at {here(read)}; "
        "read them with one select(User).where(User.id.in_(...))"
    )


@two
async def test_as_an_error_it_is_raised_in_the_loop_and_rolls_back(blog, unit):
    """Under `filterwarnings = error` the user's own loop fails, and nothing of the unit is committed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NPlusOneWarning, match=r"User\.posts was loaded 11 times") as raised:
            async with unit("warn") as work:
                work.session.add(Pair(one=1, two=1))
                await _relationships(work.session)
    assert "_relationships" in [entry.name for entry in raised.traceback]
    assert await blog.scalar("SELECT count(*) FROM blog_pair") == 0


@two
async def test_it_is_silenced_for_a_module_of_the_users(unit):
    """A filter by module works, since the warning is given at the user's line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=NPlusOneWarning, module=__name__)
        async with unit("warn") as work:
            await _relationships(work.session)


@two
async def test_a_task_of_its_own_has_no_place(unit):
    """A task may be made of the load alone, so that no line of the user's is in it; the unit is named all the same."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", NPlusOneWarning)
        async with unit("warn") as work:
            for user in await work.session.scalars(select(User)):
                await asyncio.create_task(user.awaitable_attrs.posts)
    assert str(told[0].message) == (
        "User.posts was loaded 11 times in begin(), one object at a time; "
        f"add .options(selectinload(User.posts)){TO_USER}"
    )


@two
async def test_other_sessions_are_left_alone(blog, unit):
    """A session of the application's own, beside units that are watched, is not."""
    async with unit("raise") as work, AsyncSession(blog.blog) as session:
        await work.session.get(User, 1)
        for user in await session.scalars(select(User)):
            await user.awaitable_attrs.posts
    async with unit("allow") as work:
        await _relationships(work.session)


async def test_a_rolled_back_test_has_the_manager_it_would_have(blog):
    """The testing kit goes on with the option."""
    async with rolled_back(UnitOfWorkManager(blog.blog, lazy_loads="warn")) as manager:
        assert manager.lazy_loads == "warn"
        with pytest.warns(NPlusOneWarning, match=r"User\.posts was loaded 11 times"):
            async with manager.begin() as work:
                await _relationships(work.session)
