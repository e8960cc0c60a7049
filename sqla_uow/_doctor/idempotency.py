"""Whether somebody removes the idempotency keys that have expired."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import inspect

from sqla_uow._doctor.report import Finding, judged

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from sqla_uow._doctor.subject import Subject

__all__ = ["idempotency_keys"]

_TABLE = "uow_idempotency"


async def idempotency_keys(subject: Subject, late: str) -> list[Finding]:
    """Look at the record that has expired first, in the table of the usual name; nothing is said where there is none.

    Args:
        subject: the database.
        late: SQL: whether a row has been expired for more than twice the time that it was kept.
    """
    async with subject.engine.connect() as connection:
        if not await connection.run_sync(_has_table):
            return []
    is_late = bool(await subject.value(f"SELECT {late} FROM {_TABLE} ORDER BY expires_at LIMIT 1"))  # noqa: S608  # ours
    value = "expired ones are left" if is_late else "expired ones are removed"
    advice = "expired for more than twice as long as they count; run 'python -m sqla_uow purge' from a timer"
    return [judged("idempotency keys", value, advice, wrong=is_late, level="warning")]


def _has_table(connection: Connection) -> bool:
    return inspect(connection).has_table(_TABLE)
