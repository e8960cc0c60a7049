"""The driver's own connection, as users take it, and statements sent on it."""

from __future__ import annotations


async def raw_of(session):
    """Return the driver's own connection, as users get it."""
    connection = await session.connection()
    return (await connection.get_raw_connection()).driver_connection


async def send(raw, sql):
    """Send a statement past SQLAlchemy."""
    if hasattr(raw, "execute"):  # asyncpg, psycopg, aiosqlite
        await raw.execute(sql)
    else:
        async with raw.cursor() as cursor:
            await cursor.execute(sql)
