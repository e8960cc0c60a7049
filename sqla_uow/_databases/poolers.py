"""What becomes of prepared statements behind a pooler that gives each transaction another session of the server."""

from __future__ import annotations

from sqla_uow._databases.failures import code_of

__all__ = ["explain"]

# https://www.postgresql.org/docs/current/errcodes-appendix.html: there is no such statement, and: there is one already.
_STATES = ("26000", "42P05")
_REMEDIES = {"asyncpg": "{'statement_cache_size': 0}", "psycopg": "{'prepare_threshold': None}"}


def explain(error: BaseException | None, driver: str) -> None:
    """Add a note to an error about prepared statements, which names what has to be set.

    Args:
        error: of SQLAlchemy or of the driver itself.
        driver: of the engine.
    """
    if error is None or driver not in _REMEDIES or code_of(getattr(error, "orig", None) or error) not in _STATES:
        return
    error.add_note(
        "prepared statements do not outlive a transaction behind a pooler such as PgBouncer in transaction mode; pass "
        f"connect_args={_REMEDIES[driver]} to create_async_engine()"
    )
