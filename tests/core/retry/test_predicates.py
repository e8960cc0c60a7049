"""A predicate that is async would always say yes: a coroutine is true."""

from __future__ import annotations

import functools

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, current_unit, transactional
from tests.kit.models import Unique


async def says_no(*_args):
    """Be a coroutine, which is true."""
    return False


async def yields_no(*_args):
    """Be an async generator, which is true."""
    yield False


class SaysNo:
    async def __call__(self, *_args):
        return False

    async def method(self, *_args):
        return False


ASYNC = {
    "function": says_no,
    "generator": yields_no,
    "partial": functools.partial(says_no, 1),
    "object": SaysNo(),
    "method": SaysNo().method,
    "partial of an object": functools.partial(functools.partial(SaysNo()), 1),
}


@pytest.mark.parametrize("predicate", ASYNC.values(), ids=list(ASYNC))
def test_an_async_retry_on_is_refused_at_decoration(predicate):
    """It says what to do instead."""

    async def work():
        """Be decorated."""

    with pytest.raises(
        TypeError, match=r"^retry_on of .*work\(\) is given .*always count as true; pass a plain function"
    ):
        transactional(retry_on=predicate)(work)


@pytest.mark.parametrize("name", ["clock", "rng"])
def test_an_async_clock_is_refused_at_construction(name):
    """So is a policy whose answer is needed at once; `sleep` is awaited."""
    with pytest.raises(TypeError, match=rf"^RetryPolicy\({name}=...\) is given says_no, which is async"):
        RetryPolicy(**{name: says_no})
    RetryPolicy(sleep=says_no)


async def test_a_coroutine_that_nobody_could_foresee_is_refused_at_the_call(db):
    """A lambda around an async function: it must neither retry nor leave a coroutine that was never awaited."""
    await db.run("INSERT INTO uniq (id, name) VALUES (1, 'taken')")
    runs = []

    @transactional(retries=3, retry_on=lambda error: says_no(error, 1))
    async def work():
        runs.append(1)
        current_session().add(Unique(id=2, name="taken"))

    refused = pytest.raises(TypeError, match=r"^retry_on of .*work\(\) returned a coroutine")
    with UnitOfWorkManager(db.engine()).activate(), refused as caught:
        await work()
    assert isinstance(caught.value.__context__, IntegrityError)
    assert runs == [1]
    assert await db.scalar("SELECT count(*) FROM uniq") == 1


async def test_what_a_predicate_was_handling_when_it_failed(db):
    """Its error keeps the context that it has."""

    def fails(_error):
        try:
            int("none")
        except ValueError:
            raise LookupError  # noqa: B904  # what is looked at here

    manager = UnitOfWorkManager(db.engine())

    @transactional(using=manager, retries=1, retry_on=fails)
    async def work():
        current_unit(manager).before_commit(lambda: {}["none"])
        await current_session(manager).execute(text("SELECT 1"))

    with pytest.raises(LookupError) as caught:
        await work()
    assert type(caught.value) is LookupError
    assert type(caught.value.__context__) is ValueError
