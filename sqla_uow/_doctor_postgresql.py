"""What the doctor asks PostgreSQL."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqla_uow._doctor_report import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqla_uow._doctor_subject import Check, Subject

__all__ = ["CHECKS"]

_CLOCK_SECONDS = 2.0
_TURNS = 4
_PORT = 5432
_LONG_DEADLOCK = 5_000  # ms


async def _version(subject: Subject) -> list[Finding]:
    return [Finding("server", f"PostgreSQL {await subject.value('SHOW server_version')}")]


async def _settings(subject: Subject) -> list[Finding]:
    deadlock = int(await subject.value("SELECT setting FROM pg_settings WHERE name = 'deadlock_timeout'"))
    found = [
        Finding(
            "deadlock_timeout",
            f"{deadlock} ms",
            "note" if deadlock >= _LONG_DEADLOCK else "fine",
            "everybody behind a deadlock waits as long" if deadlock >= _LONG_DEADLOCK else "",
        )
    ]
    advice = {
        "lock_timeout": "a lock that is waited for longer is a conflict, and retried",
        "statement_timeout": "ends statements of units too, which is no conflict; give timeout= to the functions instead",
        "idle_in_transaction_session_timeout": "ends units that wait for something else; they are retried",
    }
    for name, meaning in advice.items():
        milliseconds = int(await subject.value("SELECT setting FROM pg_settings WHERE name = :name", name=name))
        is_set = milliseconds > 0
        found.append(
            Finding(name, f"{milliseconds} ms" if is_set else "off", "note" if is_set else "fine", meaning * is_set)
        )
    default = await subject.value("SHOW default_transaction_isolation")
    found.append(Finding("default_transaction_isolation", str(default).upper()))
    durable = await subject.value("SHOW synchronous_commit")
    lossy = durable == "off"
    found.append(
        Finding(
            "synchronous_commit",
            str(durable),
            "warning" if lossy else "fine",
            "a crash of the server loses transactions that were committed; set it to on" * lossy,
        )
    )
    return found


async def _connections(subject: Subject) -> list[Finding]:
    limit = int(await subject.value("SHOW max_connections")) - int(
        await subject.value("SHOW superuser_reserved_connections")
    )
    role = int(await subject.value("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user"))
    limit = limit if role < 0 else min(limit, role)
    short = subject.connections > limit
    return [
        Finding(
            "connections",
            f"{limit} allowed, {subject.connections} wanted",
            "warning" if short else "fine",
            "calls would fail as 'not started'; make the pools smaller, or put a pooler before the server" * short,
        )
    ]


async def _pooler(subject: Subject) -> list[Finding]:
    """A pooler in transaction mode gives transactions of one connection to several sessions of the server."""
    backends: set[int] = set()
    async with subject.engine.connect() as connection, subject.engine.connect() as other:
        for _ in range(_TURNS):
            async with other.begin():  # takes the server connection that the last one had, where there is a pooler
                await other.exec_driver_sql("SELECT 1")
                async with connection.begin():
                    answer = await connection.exec_driver_sql("SELECT pg_backend_pid()")
                    backends.add(int(answer.scalar_one()))
            async with connection.begin():
                answer = await connection.exec_driver_sql("SELECT pg_backend_pid()")
                backends.add(int(answer.scalar_one()))
    server_port = await subject.value("SELECT inet_server_port()")
    between = server_port is not None and server_port != (subject.engine.url.port or _PORT)
    changes = len(backends) > 1
    if changes:
        value = "in transaction mode"
    else:
        value = "perhaps: the server listens on another port" if between else "none seen"
    seen = changes or between
    advice = "in transaction mode switch prepared statements off: statement_cache_size=0 (asyncpg), prepare_threshold=None (psycopg)"
    return [Finding("pooler", value, "note" if seen else "fine", advice * seen)]


async def _replication(subject: Subject) -> list[Finding]:
    if await subject.value("SELECT pg_is_in_recovery()"):
        lag = await subject.value("SELECT extract(epoch FROM now() - pg_last_xact_replay_timestamp())")
        behind = "unknown" if lag is None else f"{float(lag):.1f} s since the last transaction"
        return [Finding("role", f"standby, {behind}", "note", "pass its engine in replicas=, not as the primary")]
    standbys = int(await subject.value("SELECT count(*) FROM pg_stat_replication"))
    return [Finding("role", f"primary of {standbys} standbys")]


async def _clock(subject: Subject) -> list[Finding]:
    before = time.time()
    theirs = float(await subject.value("SELECT extract(epoch FROM clock_timestamp())"))
    off = theirs - (before + time.time()) / 2
    wrong = abs(off) > _CLOCK_SECONDS
    return [
        Finding(
            "clock", f"{off:+.2f} s", "note" if wrong else "fine", "timestamps of here and there do not compare" * wrong
        )
    ]


async def _verification(subject: Subject) -> list[Finding]:
    await subject.value("SELECT pg_xact_status(pg_current_xact_id())")
    return [Finding("ambiguous_commit='verify'", "works: by the transaction's id")]


CHECKS: Sequence[Check] = (_version, _settings, _connections, _pooler, _replication, _clock, _verification)
