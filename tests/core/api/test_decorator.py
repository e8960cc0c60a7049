"""What `transactional` may decorate, and what it leaves as it was."""

from __future__ import annotations

import asyncio
import functools
import inspect

import pytest
from sqlalchemy import select

from sqla_uow import UnitOfWorkManager, current_session, current_unit, errors, transactional
from tests.kit.models import Note

pytestmark = pytest.mark.drivers("sqlite", "asyncpg")


@pytest.fixture
def manager(db):
    """Provide an active manager."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        yield manager


async def test_bare_and_called(manager):
    """`@transactional`, `@transactional()` and `transactional(function)` are one."""

    async def function(a, /, *, b):
        return a, b, await current_session().scalar(select(1))

    for decorated in (transactional(function), transactional()(function), transactional(retries=1)(function)):
        assert await decorated(2, b=3) == (2, 3, 1)


async def test_methods_of_every_kind(manager):
    """R8: instance, class and static methods, whichever decorator comes first."""

    class Service:
        @transactional
        async def instance(self):
            return self, current_unit()

        @classmethod
        @transactional
        async def class_inside(cls):
            return cls, current_unit()

        @transactional
        @classmethod
        async def class_outside(cls):
            return cls, current_unit()

        @staticmethod
        @transactional
        async def static_inside():
            return None, current_unit()

        @transactional(retries=1)
        @staticmethod
        async def static_outside():
            return None, current_unit()

    service = Service()
    calls = [
        (service.instance, service), (service.class_inside, Service), (Service.class_outside, Service),
        (service.static_inside, None), (Service.static_outside, None), (functools.partial(Service.instance, service), service),
    ]  # fmt: skip
    for call, owner in calls:
        assert (await call())[0] is owner
    assert isinstance(inspect.getattr_static(Service, "class_outside"), classmethod)
    assert isinstance(inspect.getattr_static(Service, "static_outside"), staticmethod)


async def test_stacked_decorators(manager, db):
    """R8: under and above others, and twice: the inner one joins the outer."""
    units = []

    def counted(function):
        @functools.wraps(function)
        async def call(*args, **kwargs):
            units.append(current_unit())
            return await function(*args, **kwargs)

        return call

    @transactional
    @counted
    @transactional(propagation="nested")
    @counted
    async def work():
        current_session().add(Note(text="written"))
        return current_unit()

    unit = await work()
    assert units == [unit, unit]
    assert await db.rows("SELECT text FROM note") == [("written",)]


def test_it_looks_like_the_function():
    """R8: name, docstring, module, annotations, signature; a coroutine function to `inspect` and asyncio."""

    @transactional(retries=3)
    async def work(a: int, /, *, b: str = "b") -> bytes:
        """Do it."""

    assert (work.__name__, work.__doc__, work.__module__) == ("work", "Do it.", __name__)
    assert work.__qualname__ == work.__wrapped__.__qualname__
    assert work.__annotations__ == work.__wrapped__.__annotations__
    assert str(inspect.signature(work)) == "(a: 'int', /, *, b: 'str' = 'b') -> 'bytes'"
    assert inspect.iscoroutinefunction(work)
    assert inspect.iscoroutinefunction(work.__wrapped__)


async def test_wrong_arguments_are_the_functions_own_error(manager):
    """The function's own `TypeError`, in a unit that is rolled back."""

    @transactional
    async def work(a):
        pass

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        await work()


async def test_it_can_be_called_at_once_by_many(manager, db):
    """A decorated function keeps nothing: each call has its own unit."""

    @transactional
    async def work(number):
        current_session().add(Note(id=number, text="written"))
        return current_unit()

    units = await asyncio.gather(*(work(number) for number in range(1, 6)))
    assert len(set(units)) == 5
    assert await db.scalar("SELECT count(*) FROM note") == 5


async def test_recursion_joins(manager):
    """One unit, however deep."""

    @transactional
    async def work(depth):
        return {current_unit()} | (await work(depth - 1) if depth else set())

    assert len(await work(5)) == 1


# -- R8: what cannot be decorated


def sync():
    """Is no coroutine function."""


def generator():
    """Is a generator."""
    yield


async def async_generator():
    """Is an async generator."""
    yield


class Callable:
    """Is callable, but no function."""

    def __call__(self):
        pass


SYNC = "make it one; sync code cannot await an AsyncSession"
REFUSED = [
    (sync, f"@transactional got sync, which is not an 'async def' function; {SYNC}"),
    (generator, "@transactional got generator, which is a generator; make it an 'async def' that returns a list"),
    (
        async_generator,
        (
            "@transactional got async_generator, which is an async generator; collect what it yields, or use 'async with "
            "manager.begin()' in its caller"
        ),
    ),
    (Callable, f"@transactional got Callable, which is not an 'async def' function; {SYNC}"),
    (lambda: None, f"@transactional got <lambda>, which is not an 'async def' function; {SYNC}"),
    ("name", "@transactional got 'name', which is a str; decorate an 'async def' function"),
    (staticmethod(sync), f"@transactional got sync, which is not an 'async def' function; {SYNC}"),
]


@pytest.mark.parametrize(("what", "message"), REFUSED, ids=[message.split(",")[0] for _, message in REFUSED])
@pytest.mark.parametrize("decorate", [transactional, transactional()], ids=["bare", "called"])
def test_what_is_no_async_function_is_refused_at_decoration(decorate, what, message):
    """R8, T49: a `TypeError` that says what it is and what to do."""
    with pytest.raises(TypeError) as caught:
        decorate(what)
    assert str(caught.value) == message


async def test_without_a_manager_the_call_says_so():
    """The decoration needs no manager; the call does."""

    @transactional(using="another")
    async def work():
        """Never runs."""

    with pytest.raises(errors.NoManagerError) as caught:
        await work()
    assert str(caught.value) == (
        "work() found no manager 'another'; activate one with 'with manager.activate():', or run it behind a middleware"
    )
