"""What can never work is refused where it is written, with a remedy."""

from __future__ import annotations

import functools

import pytest

from sqla_uow import UnitOfWorkManager, transactional
from sqla_uow._databases.distributed import UnconfirmedPostgreSQL, YugabyteDB
from tests.kit.tenants import tenant

POSTGRESQL = pytest.mark.drivers("asyncpg", "psycopg")


async def _late():
    return "a"


@pytest.mark.drivers("asyncmy", "aiomysql", "sqlite")
@pytest.mark.parametrize("options", [{"settings": {"app.tenant": "a"}}, {"role": "clerk"}], ids=str)
async def test_other_databases_have_none(db, options):
    """Told when the manager is made, or at the call; `on_begin` works there."""
    with pytest.raises(
        ValueError, match=r"^UnitOfWorkManager 'default' has settings or a role, which transactions of .*; "
    ):
        UnitOfWorkManager(db.engine(), **options)
    manager = UnitOfWorkManager(db.engine())
    with pytest.raises(ValueError, match=r"^scope\(\) has settings or a role"):
        manager.scope(**options)

    @transactional(**options)
    async def work():
        pytest.fail("the body ran")

    with manager.activate():
        for call in (manager.begin, lambda **options: manager.attempts(retries=1, **options), lambda **_: work()):
            with pytest.raises(ValueError, match="has settings or a role"):
                opened = call(**options)
                if hasattr(opened, "__await__"):
                    await opened
    with pytest.raises(ValueError, match=r"work\(\) has settings or a role"):
        transactional(using=manager, **options)(work.__wrapped__)


@POSTGRESQL
@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"tenant": "a"}, ValueError, "has a setting 'tenant', whose name has no dot; use one such as 'app.tenant'"),
    ({"role": "a"}, ValueError, "whose name has no dot"),
    ({"app.": "a"}, ValueError, "which is no name of a setting"),
    ({"app.a b": "a"}, ValueError, "which is no name of a setting"),
    ({"app.x', true), pg_sleep(9": "a"}, ValueError, "which is no name of a setting"),
    ({5: "a"}, TypeError, "has int for the name of a setting"),
    ({"app.tenant": 5}, TypeError, "has int as the value of 'app.tenant'; use a str"),
    ({"app.tenant": b"a"}, TypeError, "has bytes as the value of 'app.tenant'"),
    ({"app.tenant": _late}, TypeError, "'app.tenant' of .* is async; use a plain function"),
    ({"app.tenant": functools.partial(_late)}, TypeError, "is async"),
    ({"app.tenant": "\0"}, ValueError, "that PostgreSQL cannot store"),
    (["app.tenant"], TypeError, "has settings of type list; pass a dict"),
], ids=str)  # fmt: skip
def test_settings_that_cannot_be(db, settings, error, message):
    """At each place where they can be written."""
    manager = UnitOfWorkManager(db.engine())
    places = {
        "UnitOfWorkManager 'default'": lambda: UnitOfWorkManager(db.engine(), settings=settings),
        "scope()": lambda: manager.scope(settings=settings),
        "begin()": lambda: manager.begin(settings=settings),
        "attempts()": lambda: manager.attempts(retries=1, settings=settings),
    }
    for who, place in places.items():
        with pytest.raises(error, match=message) as caught:
            place()
        assert who in str(caught.value)
    if "async" not in message:
        with pytest.raises(error, match=message):
            transactional(settings=settings)(_late)


@POSTGRESQL
def test_none_for_every_unit(db):
    """Where nothing lies below it, it says nothing."""
    with pytest.raises(TypeError, match="name it in optional_settings if it may be missing"):
        UnitOfWorkManager(db.engine(), settings={"app.tenant": None})


@POSTGRESQL
def test_functions_in_a_decorator(db):
    """There is nobody whom they could ask yet, and nobody reads them there."""
    for options in ({"settings": {"app.tenant": tenant.get}}, {"settings": dict}, {"role": tenant.get}):
        with pytest.raises(TypeError, match=r"has a function .*; pass (a constant|constants) there"):
            transactional(**options)(_late)


@POSTGRESQL
@pytest.mark.parametrize("names", ["app.tenant", [5], ["tenant"], 5], ids=str)
def test_optional_settings_that_cannot_be(db, names):
    """A string is not several names."""
    with pytest.raises((TypeError, ValueError), match=r"^UnitOfWorkManager 'default' has"):
        UnitOfWorkManager(db.engine(), optional_settings=names)


@POSTGRESQL
@pytest.mark.parametrize("role", ["", 5, _late], ids=str)
def test_roles_that_cannot_be(db, role):
    """As values."""
    with pytest.raises((TypeError, ValueError), match="role"):
        UnitOfWorkManager(db.engine(), role=role)


@POSTGRESQL
async def test_a_name_that_the_manager_does_not_have(db):
    """Misspelt, it would leave in force what it was to override."""
    manager = UnitOfWorkManager(db.engine(), settings={"app.tenant": "a"}, optional_settings=["app.user"])
    message = "has a setting 'app.tennant' that its manager does not have; use 'app.tenant' or 'app.user', or name it in optional_s"
    misspelt = {"app.tennant": "b"}
    for call in (manager.begin, manager.scope, lambda **options: manager.attempts(retries=1, **options)):
        with pytest.raises(ValueError, match=message):
            call(settings=misspelt)
    with pytest.raises(ValueError, match=message):
        async with manager.scope(settings=lambda: misspelt), manager.begin():
            pytest.fail("the body ran")


@POSTGRESQL
async def test_yugabytedb_behind_the_same_dialect(db, monkeypatch):
    """Known with the first connection only: nothing runs there without what it was to be told."""
    # No server of that kind is at hand; only its answer to "who are you" is played.
    monkeypatch.setattr(UnconfirmedPostgreSQL, "recognise", lambda *_: YugabyteDB())
    manager = UnitOfWorkManager(db.engine(), settings={"app.tenant": "a"})
    with pytest.raises(
        ValueError, match=r"^begin\(\) has settings or a role, which transactions of YugabyteDB do not have"
    ):
        async with manager.begin() as unit:
            await unit.session.connection()
