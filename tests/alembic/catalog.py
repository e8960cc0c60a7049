"""What a database's catalog says of a table."""

from __future__ import annotations

from sqlalchemy import inspect


async def columns(db, table="account"):
    """Return each column's reflection by name."""
    async with db.outside() as connection:
        return {c["name"]: c for c in await connection.run_sync(lambda sync: inspect(sync).get_columns(table))}


async def triggers(db):
    """Return the names of all triggers."""
    statement = {
        "postgresql": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal",
        "mysql": "SELECT trigger_name FROM information_schema.triggers WHERE trigger_schema = database()",
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger'",
    }[db.family]
    return sorted(row[0] for row in await db.rows(statement))


async def identity(db, table="account"):
    """Return what changes when a table's rows are written anew: its file, its table id, its pages."""
    statement = {
        "postgresql": "SELECT pg_relation_filenode(CAST(CAST(:table AS text) AS regclass))",
        "mysql": "SELECT table_id FROM information_schema.innodb_sys_tables WHERE name = concat(database(), '/', :table)",
        "sqlite": "SELECT rootpage FROM sqlite_master WHERE name = :table",
    }[db.family]
    return await db.scalar(statement, table=table)


async def functions(db):
    """Return the names of our triggers' functions, which only PostgreSQL has."""
    if db.family != "postgresql":
        return []
    return [row[0] for row in await db.rows("SELECT proname FROM pg_proc WHERE proname LIKE 'sqla_uow%'")]
