"""Each transaction has its settings before the first statement of the user, for exactly itself; without them it does not begin."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from sqla_uow import (
    UnitOfWorkManager,
    after_commit,
    current_session,
    current_unit,
    transactional,
)
from sqla_uow.errors import NoUnitError, PropagationError, ReadOnlyError, RollbackOnlyError, SettingMissingError
from sqla_uow.testing import FaultPlan, assert_no_leaks
from tests.kit.tenants import PARCELS, ROLE, SEND, TOLD, USER, Parcel, tenant

pytestmark = pytest.mark.drivers("asyncpg", "psycopg")


async def told(manager, **options):
    """Return the tenant that the server knows in a unit of its own."""
    async with manager.begin(**options) as unit:
        return await unit.session.scalar(TOLD)


# -- what is required


@pytest.mark.parametrize("how", ["unset", "none"])
async def test_without_a_value_nothing_begins(engine, how):
    """An unset variable, or None: the error names the setting, and no connection is taken."""
    manager = UnitOfWorkManager(engine, settings={"app.tenant": tenant.get if how == "unset" else lambda: None})
    with assert_no_leaks(engine):
        with pytest.raises(
            SettingMissingError, match=r"^begin\(\) has no value for the setting 'app.tenant'"
        ) as caught:
            async with manager.begin():
                pytest.fail("the body ran")
        assert caught.value.name == "app.tenant"
        assert isinstance(caught.value, LookupError)
        async with manager.scope():
            with pytest.raises(SettingMissingError):
                current_session(manager)
        assert engine.pool.checkedin() == 0  # none was ever made
    assert manager.statistics().rolled_back == 1


async def test_the_error_of_a_function_is_the_attempts(manager, engine):
    """What is no lookup that failed is raised as it is."""

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with UnitOfWorkManager(engine, settings={"app.tenant": broken}).begin():
            pytest.fail("the body ran")


async def test_what_is_optional_may_be_missing(engine, of_a):
    """It is the empty string then, also on a connection on which somebody has left another value."""
    manager = UnitOfWorkManager(engine, settings={"app.tenant": tenant.get, "app.user": lambda: None},
                                optional_settings=["app.user", "app.reason"])  # fmt: skip
    ask = text("SELECT current_setting('app.user'), current_setting('app.reason')")
    async with engine.connect() as connection:
        await connection.execute(text("SET app.\"user\" = 'somebody'"))
        await connection.commit()
    async with manager.begin() as unit:
        assert (await unit.session.execute(ask)).one() == ("", "")
    async with manager.begin(settings={"app.reason": "refund"}) as unit:
        assert (await unit.session.execute(ask)).one() == ("", "refund")


# -- whose values


@pytest.mark.parametrize("options", [
    {}, {"read_only": True}, {"timeout": 5}, {"isolation": "SERIALIZABLE"}, {"isolation": "REPEATABLE READ", "timeout": 5},
], ids=str)  # fmt: skip
async def test_a_unit_has_its_settings_and_the_next_one_its_own(manager, engine, of_a, options):
    """In every kind of unit, on one connection; past the manager there is nothing, so no row."""
    with assert_no_leaks(manager, settings=True):
        for whose in ("a", "b"):
            tenant.set(whose)
            async with manager.begin(**options) as unit:
                assert (await unit.session.execute(PARCELS)).all() == [(whose, f"of {whose}")]
            async with engine.connect() as connection:
                assert (await connection.execute(PARCELS)).all() == []


async def test_nobody_writes_for_another(manager, db, of_a):
    """The policy's check is told by the same setting."""
    with pytest.raises(DBAPIError, match="row-level security"):
        async with manager.begin() as unit:
            await unit.session.execute(SEND, {"tenant": "b", "body": "forged"})
    assert await db.rows("SELECT tenant FROM parcel ORDER BY id") == [("a",), ("b",)]


async def test_a_value_is_of_the_moment_when_the_unit_was_opened(manager, of_a):
    """The transaction begins later, with its first statement."""
    async with manager.begin() as unit:
        tenant.set("b")
        assert await unit.session.scalar(TOLD) == "a"


async def test_each_attempt_asks_again(manager, of_a):
    """The next attempt has the value of then; one that has none ends the call."""
    seen = []

    @transactional(using=manager, retries=2)
    async def look():
        seen.append(await current_session(manager).scalar(TOLD))
        tenant.set("b")
        await current_session(manager).execute(select(Parcel.body))

    with FaultPlan(manager, "conflict", at="commit"):
        await look()
    assert seen == ["a", "b"]


async def test_a_retry_without_a_value(manager):
    """It does not begin."""
    values = iter(["a", None])
    told = UnitOfWorkManager(manager.engine, settings={"app.tenant": lambda: next(values)})
    with pytest.raises(SettingMissingError), FaultPlan(told, "conflict", at="commit"):
        async for attempt in told.attempts(retries=3):
            async with attempt as unit:
                await unit.session.execute(PARCELS)


async def test_overridden_by_name(engine, of_a):
    """By a scope, a function, a block and a loop, the inner over the outer; what they do not name stays the manager's."""
    manager = UnitOfWorkManager(engine, settings={"app.tenant": tenant.get, "app.user": "u"})
    both = text("SELECT current_setting('app.tenant') || current_setting('app.user')")

    @transactional(using=manager, settings={"app.tenant": "d"})
    async def decorated():
        return await current_session(manager).scalar(both)

    async with manager.scope(settings={"app.tenant": lambda: "s"}):
        assert await current_session(manager).scalar(both) == "su"
        async with manager.begin() as unit:
            assert await unit.session.scalar(both) == "su"
        assert await decorated() == "du"
        async with manager.begin(settings={"app.user": "v"}) as unit:
            assert await unit.session.scalar(both) == "sv"
        async for attempt in manager.attempts(retries=1, settings=lambda: {"app.tenant": "l"}):
            async with attempt as unit:
                assert await unit.session.scalar(both) == "lu"
    async with manager.begin() as unit:
        assert await unit.session.scalar(both) == "au"


async def test_names_are_compared_as_the_server_does(engine, of_a):
    """In any case of letters."""
    manager = UnitOfWorkManager(engine, settings={"App.Tenant": tenant.get})
    assert await told(manager, settings={"app.TENANT": "b"}) == "b"


async def test_a_manager_without_settings_of_its_own(engine):
    """A single unit may have some."""
    manager = UnitOfWorkManager(engine)
    assert await told(manager, settings={"app.tenant": "a"}) == "a"
    assert await told(manager) in (None, "")


async def test_before_there_is_a_tenant(manager, engine):
    """Written out at one unit: no tenant, and another role; what joins it has the same."""
    await_role = text("SELECT current_user, current_setting('app.tenant')")

    @transactional(using=manager)
    async def joined():
        return (await current_session(manager).execute(await_role)).one()

    async with manager.begin(settings={"app.tenant": None}, role="none") as unit:
        assert (await unit.session.execute(await_role)).one() == (ROLE, "")
        assert await joined() == (ROLE, "")
        assert (await unit.session.execute(PARCELS)).all() == []
    with pytest.raises(SettingMissingError):
        async with manager.begin(settings={"app.tenant": lambda: None}):
            pytest.fail("the body ran")


async def test_a_role(db, engine, of_a):
    """Taken on for the transaction, by a manager or by a unit, constant or asked."""
    login = db.engine(pool_size=1, max_overflow=0)  # a superuser's
    for role in (ROLE, lambda: ROLE):
        manager = UnitOfWorkManager(login, settings={"app.tenant": tenant.get}, role=role)
        with assert_no_leaks(manager, settings=True):
            async with manager.begin() as unit:
                assert await unit.session.scalar(USER) == ROLE
                assert (await unit.session.execute(PARCELS)).all() == [("a", "of a")]
            async with manager.begin(role="none") as unit:
                assert await unit.session.scalar(USER) == "postgres"
        async with manager.scope(role="none"):
            assert await current_session(manager).scalar(USER) == "postgres"
    missing = UnitOfWorkManager(login, role=lambda: None)
    with pytest.raises(SettingMissingError, match=r"^begin\(\) has no role"):
        async with missing.begin():
            pytest.fail("the body ran")


async def test_a_role_that_does_not_exist(manager, engine, of_a):
    """The first statement fails, and nothing runs as somebody else, also where the error is swallowed."""
    with pytest.raises(RollbackOnlyError, match="22023"):
        async with manager.begin(role="nobody") as unit:
            with pytest.raises(DBAPIError, match="nobody"):
                async with unit.session.begin_nested():
                    await unit.session.execute(PARCELS)
            await unit.session.execute(PARCELS)
    assert await told(manager) == "a"


# -- who joins, and who does not


@pytest.mark.parametrize("propagation", ["required", "nested", "mandatory"])
async def test_a_joined_function_that_asks_for_another_value(manager, of_a, propagation):
    """An error that names the setting and no value, also where only the context has changed."""

    @transactional(using=manager, settings={"app.tenant": "b"}, propagation=propagation)
    async def for_b():
        pytest.fail("the body ran")

    @transactional(using=manager, propagation=propagation)
    async def for_whoever():
        return await current_session(manager).scalar(TOLD)

    for call, whose in ((for_b, "a"), (for_whoever, "b")):
        with pytest.raises(PropagationError, match=r"asks for another value of 'app\.tenant' than") as caught:
            async with manager.begin():
                tenant.set(whose)
                await call()
        assert "'b'" not in str(caught.value)
        tenant.set("a")
    async with manager.begin(settings={"app.tenant": "a"}):
        assert await for_whoever() == "a"


async def test_a_role_that_is_asked_of_an_open_unit(manager, of_a):
    """As a setting."""
    async with manager.begin(role=ROLE), manager.begin(role=ROLE, propagation="nested") as unit:
        assert await unit.session.scalar(USER) == ROLE
    with pytest.raises(PropagationError, match="'role'"):
        async with manager.begin(), manager.begin(role=ROLE):
            pytest.fail("the body ran")


async def test_settings_asked_of_a_unit_that_has_none(engine):
    """Never without a word."""
    manager = UnitOfWorkManager(engine)
    with pytest.raises(PropagationError, match=r"'app\.tenant'"):
        async with manager.begin(), manager.begin(settings={"app.tenant": "a"}):
            pytest.fail("the body ran")


async def test_a_unit_beside_asks_for_itself(db, engine, of_a):
    """`requires_new` has what holds around it, not what its outer unit was given."""
    manager = UnitOfWorkManager(db.engine(url=engine.url, pool_size=2), settings={"app.tenant": tenant.get})
    async with manager.begin(settings={"app.tenant": "b"}) as outer:
        assert await outer.session.scalar(TOLD) == "b"
        assert await told(manager, propagation="requires_new") == "a"
        tenant.set("c")
        assert await told(manager, propagation="requires_new") == "c"
        assert await outer.session.scalar(TOLD) == "b"


async def test_hooks_and_tasks_ask_in_their_own_context(manager):
    """A scope's value holds in it, for hooks and child tasks too; behind its end there is none, and no unit."""
    seen = []

    async def look():
        seen.append(await told(manager))

    late = asyncio.Event()

    async def lately():
        await late.wait()
        with pytest.raises(SettingMissingError):
            await told(manager)
        return "refused"

    with manager.activate():
        async with manager.scope(settings={"app.tenant": "s"}):
            async with manager.begin() as unit:
                await unit.session.execute(PARCELS)
                after_commit(look)
            await asyncio.create_task(look())
            behind = asyncio.create_task(lately())
        late.set()
        assert (seen, await behind) == (["s", "s"], "refused")


# -- read sessions


async def test_a_read_session_ends_when_the_tenant_changes(manager, engine, of_a):
    """The next use begins anew, on the one connection; what was loaded stays readable, and is not found again."""
    with manager.activate(), assert_no_leaks(manager, settings=True):
        async with manager.scope():
            kept = current_session()
            mine = await kept.scalar(select(Parcel))
            assert mine.body == "of a"
            tenant.set("b")
            assert current_session() is not kept
            assert engine.pool.checkedout() == 1
            assert await current_session().get(Parcel, mine.id) is None
            other = await current_session().scalar(select(Parcel))
            assert (mine.body, other.body) == ("of a", "of b")
            assert engine.pool.checkedout() == 1
            with pytest.raises(NoUnitError, match="gave way"):
                await kept.execute(PARCELS)
            tenant.set("c")
            current_session()
            async with manager.begin() as unit:  # needs the connection that nobody has ended yet
                assert await unit.session.scalar(TOLD) == "c"
            tenant.set("a")
            assert (await current_session().scalar(select(Parcel))).body == "of a"
            tenant.set("b")
            current_session()
        assert engine.pool.checkedout() == 0


async def test_a_session_that_was_kept_over_a_change(manager, of_a):
    """Nothing is read by it, though nobody has asked for another session yet."""
    async with manager.scope():
        kept = current_session(manager)
        await kept.execute(PARCELS)
        tenant.set("b")
        with pytest.raises(
            NoUnitError, match=r"^'app.tenant' has changed since the read session of this scope was begun"
        ):
            await kept.execute(PARCELS)
        assert (await current_session(manager).execute(PARCELS)).all() == [("b", "of b")]


async def test_a_change_while_rows_are_read(manager, of_a):
    """The stream is named."""
    async with manager.scope():
        rows = await current_session(manager).stream(text("SELECT generate_series(1, 5000)"))
        await rows.fetchone()
        tenant.set("b")
        with pytest.raises(PropagationError, match="settings of its scope have changed"):
            current_session(manager)
        tenant.set("a")
        await rows.close()


async def test_an_object_that_was_changed_before_the_tenant(manager, of_a):
    """As ever: what would be lost is told."""
    with pytest.raises(ReadOnlyError, match="was changed in a session that only reads"):
        async with manager.scope():
            (await current_session(manager).scalar(select(Parcel))).body = "lost"
            tenant.set("b")
            current_session(manager)
    tenant.set("a")
    with pytest.raises(ReadOnlyError, match="was changed in a session that only reads"):
        async with manager.scope():
            parcel = await current_session(manager).scalar(select(Parcel))
            tenant.set("b")
            current_session(manager)
            parcel.body = "lost"
    assert manager.engine.pool.checkedout() == 0


# -- within a transaction


async def test_savepoints_do_not_take_settings_back(manager, of_a):
    """They were made before it, also if the first statement is in one."""
    async with manager.begin() as unit:
        with pytest.raises(KeyError):
            async with manager.begin(propagation="nested"):
                assert await unit.session.scalar(TOLD) == "a"
                raise KeyError
        assert await unit.session.scalar(TOLD) == "a"


async def test_what_the_body_sets_itself(manager, of_a):
    """`set_config(..., true)` ends with the transaction; SET without LOCAL is seen by the testing kit."""
    with assert_no_leaks(manager, settings=True):
        async with manager.begin() as unit:
            await unit.session.execute(
                text("SELECT set_config('app.tenant', 'b', true), set_config('work_mem', '1MB', true)")
            )
            assert await unit.session.scalar(TOLD) == "b"
        assert await told(manager) == "a"
    for statement, name in (
        ("SET app.tenant = 'secret'", "app.tenant"),
        ("SET app.other = 'secret'", "app.other"),
        ("SELECT set_config('app.third', 'secret', false)", "app.third"),
        ("SET work_mem = '7MB'", "work_mem"),
        (f"SET SESSION ROLE {ROLE}", "role"),
    ):
        with (
            pytest.raises(
                AssertionError, match=f"1 connection came back with '{name}' changed; taken by task"
            ) as caught,
            assert_no_leaks(manager, settings=True),
        ):
            async with manager.begin() as unit:
                await unit.session.execute(text(statement))
        assert "secret" not in str(caught.value)
        assert await told(manager) == "a"


async def test_verified_commits(engine, of_a, db):
    """The mark of a COMMIT comes after the settings, as that role."""
    manager = UnitOfWorkManager(engine, settings={"app.tenant": tenant.get}, ambiguous_commit="verify", role=ROLE)
    with FaultPlan(manager, "lost", at="after commit"):
        async with manager.begin() as unit:
            await unit.session.execute(SEND, {"tenant": "a", "body": "verified"})
    assert await db.rows("SELECT tenant FROM parcel WHERE body = 'verified'") == [("a",)]


# -- what is told


async def test_no_value_is_shown(engine, db, of_a, caplog):
    """In no log, with echo too, no error, no representation."""
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", logger="sqlalchemy.engine")
    loud = db.engine(url=engine.url, echo="debug")
    manager = UnitOfWorkManager(loud, settings={"app.tenant": "s3cret", "app.user": lambda: "s3cret"})
    loud.sync_engine.echo = True
    async with manager.begin(timeout=5) as unit:
        await unit.session.execute(text("SELECT 1"))
        shown = [repr(unit), repr(manager), repr(unit._transaction.preamble.told)]
    error = None
    try:
        async with manager.begin(role="nobody") as unit:
            await unit.session.execute(text("SELECT 1"))
    except DBAPIError as caught:
        error = caught
    while error is not None:
        shown += [str(error), repr(error), repr(getattr(error, "params", None))]
        error = error.__cause__ or error.__context__
    assert "set_config" in caplog.text
    assert "s3cret" not in caplog.text.replace("row (", "") + "".join(shown)


@pytest.mark.parametrize("value", ["\0", "\ud800", 5, b"a"])
async def test_a_value_that_cannot_be_one(engine, value):
    """Refused before the driver, which would show it."""
    manager = UnitOfWorkManager(engine, settings={"app.tenant": lambda: value})
    with pytest.raises((TypeError, ValueError), match=r"value of 'app\.tenant'") as caught:
        async with manager.begin():
            pytest.fail("the body ran")
    assert repr(value) not in str(caught.value)


async def test_values_are_no_sql(manager, of_a):
    """Whatever stands in them."""
    odd = "a'; DROP TABLE parcel; -- \\ :x %s $1 ü"
    assert await told(manager, settings={"app.tenant": odd}) == odd


async def test_the_unit_of_a_hook_at_begin(engine, of_a):
    """It is called after the settings."""
    seen = []

    async def on_begin(unit):
        seen.append((await unit.session.scalar(TOLD), unit is current_unit(manager)))

    manager = UnitOfWorkManager(engine, settings={"app.tenant": tenant.get}, on_begin=on_begin)
    async with manager.begin() as unit:
        await unit.session.execute(PARCELS)
    assert seen == [("a", True)]
