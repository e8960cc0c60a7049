"""What is made before there is a session: repositories that hold a proxy, jobs that open a scope of whatever is activated."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from sqla_uow import UnitOfWorkManager, current_session, scope, session_proxy, transactional
from sqla_uow.errors import NoManagerError, NoUnitError
from sqla_uow.testing import rolled_back
from tests.kit.models import Note


class Notes:
    """A repository: made once, used in many units."""

    def __init__(self, session):
        self.session = session

    async def add(self, words):
        self.session.add(Note(text=words))
        await self.session.flush()

    async def count(self):
        return await self.session.scalar(text("SELECT count(*) FROM note"))


@pytest.fixture
def manager(db):
    """Return one over a fresh database."""
    return UnitOfWorkManager(db.engine())


async def test_a_repository_is_in_the_unit_that_uses_it(db, manager):
    """Made outside any unit; each call writes in its own unit, and reads in the scope's session."""
    notes = Notes(session_proxy(manager))

    @transactional(using=manager)
    async def write(words):
        await notes.add(words)
        assert current_session(manager).new == notes.session.new
        assert isinstance(notes.session, AsyncSession)

    await write("one")
    await write("two")
    async with manager.scope():
        assert await notes.count() == 2
    assert await db.scalar("SELECT count(*) FROM note") == 2


async def test_the_session_itself_is_reached(manager):
    """Attributes are set on it, and its objects are looked for in it."""
    proxy = session_proxy(manager)
    async with manager.begin() as unit:
        note = Note(text="here")
        proxy.add(note)
        proxy.autoflush = False
        assert note in proxy
        assert list(proxy) == [note]
        assert unit.session.autoflush is False
        proxy.expunge(note)


async def test_outside_a_unit_it_says_what_current_session_says(manager):
    """The same error with the same remedy; and what it is can be seen without one."""
    proxy = session_proxy(manager)
    with pytest.raises(NoUnitError, match="no unit of work of this manager is open here"):
        proxy.add(Note(text="nowhere"))
    with manager.activate(), pytest.raises(NoUnitError, match="no unit of work is open for manager 'default'"):
        session_proxy().add(Note(text="nowhere"))
    assert repr(proxy) == "<session_proxy of the manager 'default'>"
    with pytest.raises(
        TypeError, match="session_proxy\\(\\) got int; pass the name of a manager, or the manager itself"
    ):
        session_proxy(1)


async def test_a_job_runs_in_a_scope_of_whoever_is_activated(db, manager):
    """In a test that is the test's manager, and nothing stays in the database."""

    async def job():
        async with scope():
            await Notes(session_proxy()).count()
            return await count()

    @transactional
    async def count():
        await Notes(current_session()).add("job")
        return await Notes(current_session()).count()

    with manager.activate():
        assert await job() == 1
    async with rolled_back(manager):
        assert await job() == 2
    assert await db.scalar("SELECT count(*) FROM note") == 1
    with pytest.raises(NoManagerError, match="scope\\(\\) found no manager 'default'; activate one"):
        await job()


async def test_in_a_scope_that_nobody_has_activated(manager):
    """As a middleware opens it: its manager is found all the same."""
    async with manager.scope() as outer, scope() as inner:
        assert inner.manager is outer.manager is manager
    with pytest.raises(NoManagerError, match="scope\\(\\) found no manager 'default', only a unit of it"):
        async with manager.begin(), scope():
            raise AssertionError


async def test_the_session_has_the_class_of_the_managers_sessions(db):
    """At runtime, too: the types are checked by the type checkers."""

    class Own(AsyncSession):
        def mine(self):
            return "mine"

    manager = UnitOfWorkManager(async_sessionmaker(db.engine(), class_=Own))
    async with manager.begin():
        assert current_session(manager).mine() == session_proxy(manager).mine() == "mine"
