"""Statements that take longer than any test waits."""

from __future__ import annotations

import asyncio

from sqlalchemy import event

SLOW = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "SELECT SLEEP(30)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 2000000000) SELECT count(*) FROM n",
}
RUNNING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND state = 'User sleep'",
}


def sent(engine, needle):
    """Return an event that is set when a statement with `needle` in it has been handed to the driver."""
    handed_over = asyncio.Event()

    def before_cursor_execute(_connection, _cursor, statement, *_rest):
        if needle in statement:
            handed_over.set()

    event.listen(engine.sync_engine, "before_cursor_execute", before_cursor_execute)
    return handed_over
