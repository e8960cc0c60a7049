"""What the doctor asks SQLite."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from sqla_uow._doctor.idempotency import idempotency_keys
from sqla_uow._doctor.report import Finding, judged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqla_uow._doctor.subject import Check, Subject

__all__ = ["CHECKS"]


async def _version(subject: Subject) -> list[Finding]:  # as all checks
    place = "a file" if subject.engine.url.database not in (None, "", ":memory:") else "memory"
    return [Finding("library", f"SQLite {sqlite3.sqlite_version}, in {place}")]


async def _settings(subject: Subject) -> list[Finding]:
    journal = str(await subject.value("PRAGMA journal_mode"))
    busy = int(await subject.value("PRAGMA busy_timeout"))
    foreign = bool(await subject.value("PRAGMA foreign_keys"))
    blocks = "readers hold up writers, and the other way round; PRAGMA journal_mode=WAL, once"
    at_once = "other processes' locks are a conflict at once; connect_args={'timeout': 5}"
    lax = "not enforced; PRAGMA foreign_keys=ON for each connection"
    return [
        judged("journal_mode", journal, blocks, wrong=journal not in ("wal", "memory")),
        judged("busy_timeout", f"{busy} ms", at_once, wrong=not busy),
        judged("foreign_keys", "on" if foreign else "off", lax, wrong=not foreign),
    ]


async def _idempotency_keys(subject: Subject) -> list[Finding]:
    return await idempotency_keys(
        subject, "julianday('now') - julianday(expires_at) > 2 * (julianday(expires_at) - julianday(created_at))"
    )


CHECKS: Sequence[Check] = (_version, _settings, _idempotency_keys)
