"""Tenant policies in migrations: made, taken back, written into scripts and generated files."""

from __future__ import annotations

import io

import pytest
import sqlalchemy as sa
from alembic.autogenerate import render_python_code
from alembic.operations import Operations
from alembic.operations.ops import UpgradeOps
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError

from sqla_uow.alembic import CreateTenantPolicyOp, DropTenantPolicyOp, install

POSTGRESQL = pytest.mark.drivers("asyncpg", "psycopg")
CLERK = "uow_policy_clerk"
STATE = "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE relname = 'Parcel'"
POLICIES = "SELECT polname FROM pg_policy JOIN pg_class ON pg_class.oid = polrelid WHERE relname = 'Parcel'"


@pytest.mark.drivers("sqlite")
def test_reversed_and_rendered(driver):
    """Each has its reverse, with the same arguments, and is written as it is called."""
    install()
    told = {"setting": "app.tenant", "schema": "s", "lock_timeout": 2.0, "retries": 3}
    one = CreateTenantPolicyOp("t", "c", type_=sa.Integer(), policy_name="p", **told)
    back = one.reverse()
    assert type(back) is DropTenantPolicyOp
    assert type(back.reverse()) is CreateTenantPolicyOp
    assert vars(back.reverse()) == vars(one) == vars(back)
    assert one.to_diff_tuple() == ("create_tenant_policy", "s", "t", "c", "app.tenant")
    written = "('t', 'c', setting='app.tenant', type_=sa.Integer(), policy_name='p', schema='s')"
    for op in (one, back):
        assert render_python_code(UpgradeOps([op])).splitlines()[-2].strip() == f"op.{op.name}{written}"
    short = CreateTenantPolicyOp("t", "c", setting="app.tenant")
    line = "op.create_tenant_policy('t', 'c', setting='app.tenant')"
    assert render_python_code(UpgradeOps([short])).splitlines()[-2].strip() == line


@pytest.fixture
async def parcels(db):
    """A table with names that need quotes, and a role that owns nothing."""
    await db.run(
        f"DO $$ BEGIN CREATE ROLE {CLERK}; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        'CREATE TABLE "Parcel" (id serial PRIMARY KEY, "tenant Id" integer NOT NULL)',
        f"GRANT USAGE ON SCHEMA public TO {CLERK}",
        f'GRANT SELECT, INSERT, UPDATE ON "Parcel" TO {CLERK}',
        f'GRANT USAGE ON SEQUENCE "Parcel_id_seq" TO {CLERK}',
        'INSERT INTO "Parcel" ("tenant Id") VALUES (1), (2)',
    )


def create(op):
    """Write it in a migration."""
    op.create_tenant_policy("Parcel", "tenant Id", setting="app.tenant", type_=sa.Integer)


def drop(op):
    """Write it in a downgrade."""
    op.drop_tenant_policy("Parcel", "tenant Id", setting="app.tenant", type_=sa.Integer)


async def seen(db, tenant):
    """Return what the role sees of the table; None tells it nothing."""
    async with db.outside() as connection:
        await connection.execute(sa.text(f"SET LOCAL ROLE {CLERK}"))
        if tenant is not None:
            await connection.execute(sa.text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant})
        return list(await connection.scalars(sa.text('SELECT "tenant Id" FROM "Parcel" ORDER BY 1')))


@POSTGRESQL
async def test_made_and_taken_back(db, operate, parcels):
    """The rows of one tenant, none without, also for writing; afterwards as before."""
    await operate(create)
    assert await db.rows(STATE) == [(True, True)]
    assert [await seen(db, tenant) for tenant in ("1", "2", "", None)] == [[1], [2], [], []]
    with pytest.raises(sa.exc.DBAPIError, match="row-level security"):
        async with db.outside() as connection:
            await connection.execute(sa.text(f"SET LOCAL ROLE {CLERK}"))
            await connection.execute(sa.text("SELECT set_config('app.tenant', '1', true)"))
            await connection.execute(sa.text('INSERT INTO "Parcel" ("tenant Id") VALUES (2)'))
    await operate(drop)
    assert (await db.rows(STATE), await db.rows(POLICIES)) == ([(False, False)], [])
    assert await seen(db, None) == [1, 2]


@POSTGRESQL
async def test_another_policy_keeps_what_it_hides(db, operate, parcels):
    """Row level security is not switched off under it."""
    await operate(create)
    await db.run('CREATE POLICY other ON "Parcel" USING (id = 0)')
    await operate(drop)
    assert (await db.rows(STATE), await db.rows(POLICIES)) == ([(True, True)], [("other",)])


@POSTGRESQL
async def test_a_script_does_the_same(db, parcels):
    """``--sql`` writes what can be run by hand."""
    install()
    for steps, state in ((create, (True, True)), (drop, (False, False))):
        script = io.StringIO()
        context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": script})
        steps(Operations(context))
        statements = [one for one in script.getvalue().split(";\n") if one.strip()]
        await db.run(*statements)
        assert await db.rows(STATE) == [state]


@POSTGRESQL
async def test_what_is_not_there(db, operate, parcels):
    """Told with its name."""
    with pytest.raises(CommandError, match="there is no table 'none'"):
        await operate(lambda op: op.create_tenant_policy("none", "tenant_id", setting="app.tenant"))
    with pytest.raises(CommandError, match="has no column 'tenant_id'"):
        await operate(lambda op: op.create_tenant_policy("Parcel", "tenant_id", setting="app.tenant"))


@pytest.mark.drivers("sqlite", "asyncmy")
async def test_other_databases_have_none(db, operate):
    """Told, and nothing is done."""
    with pytest.raises(CommandError, match="has no row level security; leave it out there"):
        await operate(lambda op: op.create_tenant_policy("account", "id", setting="app.tenant"))


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize(("told", "message"), [
    ({"setting": "tenant"}, "whose name has no dot"),
    ({"setting": "app.x'"}, "no name of a setting"),
    ({"setting": "app.tenant", "type_": "integer"}, "use one of SQLAlchemy's"),
], ids=str)  # fmt: skip
def test_arguments_that_cannot_be(driver, told, message):
    """Refused before anything is sent."""
    with pytest.raises(CommandError, match=message):
        CreateTenantPolicyOp("t", "c", **told)
