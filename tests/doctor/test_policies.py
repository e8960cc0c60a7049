"""Row level security as the doctor tries it: each prepared mistake is found, and none where all is right."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy import make_url

from sqla_uow.__main__ import main
from tests.kit.tenants import ROLE, make_parcels, url_of

pytestmark = [pytest.mark.drivers("asyncpg", "psycopg"), pytest.mark.direct("the pooler knows one role")]

SUPERUSER, BYPASSES = "uow_doctor_super", "uow_doctor_bypass"
FAIL_OPEN = "current_setting('app.tenant', true) IS NULL OR current_setting('app.tenant', true) = '' OR tenant = current_setting('app.tenant', true)"

EMPTY_IS_ALL = "coalesce(current_setting('app.tenant', true), 'x') IN ('', tenant)"


@pytest.fixture
async def examine(db, capsys):
    """Prepare tables that are right, and a mistake; return what the doctor warns of."""
    await make_parcels(db)

    async def examine(*mistake, role=ROLE):
        await db.run(*mistake)
        url = url_of(db).set(username=role)
        arguments = ["doctor", url.render_as_string(hide_password=False), "--json", "--read-only"]
        await asyncio.to_thread(main, arguments)
        found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
        return {
            name.partition(": ")[2]: one["value"]
            for name, one in found.items()
            if name.startswith("row level security") and one["level"] != "fine"
        }

    return examine


def made(role, attributes):
    """Return what makes a role, which may be there from a test before."""
    return (
        f"DO $$ BEGIN CREATE ROLE {role} LOGIN PASSWORD 'secret' {attributes}; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        f"GRANT ALL ON parcel TO {role}",
        f"GRANT USAGE ON SCHEMA public TO {role}",
    )


async def test_what_is_right(examine):
    """Nothing is said."""
    assert await examine() == {}


async def test_nothing_is_said_of_a_database_without_policies(db, capsys):
    """Not even that."""
    arguments = ["doctor", make_url(db.url).render_as_string(hide_password=False), "--read-only"]
    await asyncio.to_thread(main, arguments)
    assert "row level" not in capsys.readouterr().out


MISTAKES = {
    "superuser": (made(SUPERUSER, "SUPERUSER"), SUPERUSER, {"role": f"'{SUPERUSER}' is a superuser"}),
    "bypassrls": (made(BYPASSES, "BYPASSRLS"), BYPASSES, {"role": f"'{BYPASSES}' has BYPASSRLS"}),
    "owner without FORCE": (
        (f"ALTER TABLE parcel OWNER TO {ROLE}", "ALTER TABLE parcel NO FORCE ROW LEVEL SECURITY"),
        ROLE,
        {"owner": "public.parcel"},
    ),
    "no policy": (
        ("CREATE TABLE bare (id int)", "ALTER TABLE bare ENABLE ROW LEVEL SECURITY"),
        ROLE,
        {"policies": "public.bare"},
    ),
    "fail-open policy": (
        (f"ALTER POLICY parcel_tenant ON parcel USING ({FAIL_OPEN})",),
        ROLE,
        {"without a setting": "public.parcel"},
    ),
    "fail-open policy, no row yet": (
        ("TRUNCATE parcel", f"ALTER POLICY parcel_tenant ON parcel USING ({FAIL_OPEN})"),
        ROLE,
        {"without a setting": "public.parcel"},
    ),
    "a second policy": (
        ("CREATE POLICY all_of_it ON parcel USING (true)",),
        ROLE,
        {"without a setting": "public.parcel"},
    ),
    "empty is everything": (
        (f"ALTER POLICY parcel_tenant ON parcel USING ({EMPTY_IS_ALL})",),
        ROLE,
        {"without a setting": "public.parcel"},
    ),
    "view": (
        ("CREATE VIEW parcels AS SELECT * FROM parcel", f"GRANT SELECT ON parcels TO {ROLE}"),
        ROLE,
        {"views": "public.parcels"},
    ),
    "materialized view": (
        ("CREATE MATERIALIZED VIEW parcels AS SELECT * FROM parcel",),
        ROLE,
        {"views": "public.parcels"},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_each_mistake(examine, mistake):
    """It alone is warned of, by its name."""
    statements, role, expected = MISTAKES[mistake]
    assert await examine(*statements, role=role) == expected


async def test_fail_open_is_seen_by_a_superuser_too(examine):
    """Who sees all rows asks the policy itself."""
    statements, *_ = MISTAKES["fail-open policy"]
    found = await examine(*made(SUPERUSER, "SUPERUSER"), *statements, role=SUPERUSER)
    assert found.keys() == {"role", "without a setting"}


@pytest.mark.parametrize("policy", [
    "tenant = current_setting('app.tenant')", "id = nullif(current_setting('app.tenant', true), '')::int",
    "id = current_setting('app.tenant', true)::int",
])  # fmt: skip
async def test_other_ways_that_show_nothing(examine, policy):
    """An error shows no row either."""
    assert await examine(f"ALTER POLICY parcel_tenant ON parcel USING ({policy})") == {}


async def test_a_view_of_the_invoker(examine):
    """It is right."""
    assert await examine("CREATE VIEW parcels WITH (security_invoker) AS SELECT * FROM parcel") == {}
