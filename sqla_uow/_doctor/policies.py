"""Row level security, tried instead of believed: where it is used, nobody may see a row without a setting."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sqla_uow._databases.failures import code_of
from sqla_uow._doctor.report import Finding, judged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from sqla_uow._doctor.subject import Subject

__all__ = ["row_level_security"]

_NAME = "row level security"
_OURS = "n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_toast%'"
_ROLE = text("SELECT rolname, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
_TABLES = text(
    "SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.relname), quote_ident(c.relname), "  # noqa: S608  # our own words
    "pg_has_role(c.relowner, 'USAGE'), c.relforcerowsecurity, pg_relation_size(c.oid) = 0, "
    "has_table_privilege(c.oid, 'SELECT'), "
    "(SELECT count(*) FROM pg_policy WHERE polrelid = c.oid) "
    f"FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relrowsecurity AND {_OURS} ORDER BY 2"
)
# Of those that show rows: for SELECT, or for all.
_SHOWING = text(
    "SELECT polrelid, pg_get_expr(polqual, polrelid) FROM pg_policy WHERE polpermissive AND polcmd IN ('r', '*') "
    "AND polqual IS NOT NULL"
)
_VIEWS = text(
    "SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(v.relname) FROM pg_class v "  # noqa: S608  # our own words
    "JOIN pg_namespace n ON n.oid = v.relnamespace JOIN pg_rewrite r ON r.ev_class = v.oid "
    "JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass "
    "JOIN pg_class t ON t.oid = d.refobjid AND t.relrowsecurity "
    "WHERE v.relkind IN ('v', 'm') AND NOT EXISTS (SELECT FROM pg_options_to_table(v.reloptions) "
    "WHERE option_name = 'security_invoker' AND option_value IN ('true', 'on', 'yes', '1')) "
    f"AND {_OURS} ORDER BY 1"
)
_SETTING = re.compile(r"current_setting\('([^']+)'")


class _Table(NamedTuple):
    """A table that has row level security."""

    oid: int
    name: str
    alias: str
    is_ours: bool
    is_forced: bool
    is_empty: bool
    can_read: bool
    policies: int


async def row_level_security(subject: Subject) -> list[Finding]:
    """Look at the tables that have row level security; say nothing where there are none."""
    async with subject.engine.connect() as connection:
        tables = [_Table(*row) for row in await connection.execute(_TABLES)]
        if not tables:
            return []
        role, is_superuser, bypasses = (await connection.execute(_ROLE)).one()
        showing = [(int(oid), str(expression)) for oid, expression in await connection.execute(_SHOWING)]
        views = [str(name) for (name,) in await connection.execute(_VIEWS)]
        names = sorted({name for _, expression in showing for name in _SETTING.findall(expression)})
        held = not (is_superuser or bypasses)
        unforced = [table.name for table in tables if table.is_ours and not table.is_forced]
        open_to_all = await _open(connection, tables, showing, names, held=held)
    return [
        judged(
            f"{_NAME}: role", f"{role!r} {'is a superuser' if is_superuser else 'has BYPASSRLS'}" if not held else f"{role!r}",
            "no policy holds for it; connect as another role, which owns nothing", wrong=not held, level="warning",
        ),
        _those(
            "owner", unforced, "policies do not hold for their owner; ALTER TABLE ... FORCE ROW LEVEL SECURITY, or "
            "connect as a role that owns nothing",
        ),
        _those("policies", [table.name for table in tables if not table.policies], "has none, so nobody but its owner sees a row"),
        _those(
            "without a setting", open_to_all,
            "shows rows to transactions that were told nothing; compare with nullif(current_setting('...', true), ''), and "
            "nothing else",
        ),
        _those(
            "views", views, "shows what its owner sees; make it WITH (security_invoker = true), and keep no materialized "
            "view of such rows",
        ),
        await _two_units(subject, names or ["sqla_uow.doctor"]),
    ]  # fmt: skip


def _those(what: str, names: Sequence[str], advice: str) -> Finding:
    return judged(f"{_NAME}: {what}", ", ".join(names) or "right", advice, wrong=bool(names), level="warning")


async def _open(
    connection: AsyncConnection,
    tables: Sequence[_Table],
    showing: Sequence[tuple[int, str]],
    names: Iterable[str],
    *,
    held: bool,
) -> list[str]:
    """Return the tables that show a row where the settings are missing, or empty.

    Where there is no row to be seen, or where all are, the policy itself is asked about a row of NULLs.
    """
    found: set[str] = set()
    for empty in (False, True):
        if empty:
            for name in names:
                await connection.execute(text("SELECT set_config(:name, '', true)"), {"name": name})
        for table in tables:
            if held and table.can_read and not table.is_empty and (table.is_forced or not table.is_ours):
                questions = [f"SELECT EXISTS (SELECT FROM {table.name})"]  # noqa: S608  # the catalog has quoted it
            else:
                questions = [
                    f"SELECT coalesce(({expression}), false) FROM (SELECT (NULL::{table.name}).*) AS {table.alias}"  # noqa: S608  # the catalog's own
                    for oid, expression in showing
                    if oid == table.oid
                ]
            for question in questions:
                if await _holds(connection, question):
                    found.add(table.name)
    return sorted(found)


async def _holds(connection: AsyncConnection, question: str) -> bool:
    """Ask; a policy that fails without its setting shows nothing."""
    try:
        async with connection.begin_nested():
            return bool(await connection.scalar(text(question.replace(":", "\\:"))))
    except DBAPIError as error:
        if error.orig is None or code_of(error.orig) is None:  # the connection is gone
            raise
        return False


async def _two_units(subject: Subject, names: Sequence[str]) -> Finding:
    """Run two units one after the other, and look what the first leaves behind."""
    ask = text("SELECT " + ", ".join(f"current_setting('{name}', true)" for name in names))
    left: list[Any] = []
    for value in ("sqla_uow doctor 1", "sqla_uow doctor 2"):
        async with subject.manager.begin(settings=dict.fromkeys(names, value)) as unit:
            left += [one for one in (await unit.session.execute(ask)).one() if one != value]
        async with subject.engine.connect() as connection:
            left += [one for one in (await connection.execute(ask)).one() if one]
    return judged(
        f"{_NAME}: two units", "the second finds what the first was told" if left else "leave nothing",
        "a pooler shares a session within a transaction; it must be in transaction mode, or session mode", wrong=bool(left),
        level="warning",
    )  # fmt: skip
