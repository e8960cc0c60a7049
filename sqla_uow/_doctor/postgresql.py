"""What the doctor asks PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_uow._doctor.idempotency import idempotency_keys
from sqla_uow._doctor.policies import row_level_security
from sqla_uow._doctor.report import Finding, judged
from sqla_uow._doctor.subject import as_replica, clock, connections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqla_uow._doctor.subject import Check, Subject

__all__ = ["CHECKS", "DISTRIBUTED"]

_TURNS = 4
_PORT = 5432
_LONG_DEADLOCK = 5_000  # ms


async def _version(subject: Subject) -> list[Finding]:
    return [Finding("server", f"PostgreSQL {await subject.value('SHOW server_version')}")]


async def _settings(subject: Subject) -> list[Finding]:
    deadlock = int(await subject.value("SELECT setting FROM pg_settings WHERE name = 'deadlock_timeout'"))
    slow = "everybody behind a deadlock waits as long"
    found = [judged("deadlock_timeout", f"{deadlock} ms", slow, wrong=deadlock >= _LONG_DEADLOCK)]
    advice = {
        "lock_timeout": "a lock that is waited for longer is a conflict, and retried",
        "statement_timeout": "ends statements of units too, which is not a conflict; give timeout= to the functions",
        "idle_in_transaction_session_timeout": "ends units that wait for something else; they are retried",
    }
    for name, meaning in advice.items():
        milliseconds = int(await subject.value("SELECT setting FROM pg_settings WHERE name = :name", name=name))
        is_set = milliseconds > 0
        found.append(judged(name, f"{milliseconds} ms" if is_set else "off", meaning, wrong=is_set))
    default = await subject.value("SHOW default_transaction_isolation")
    found.append(Finding("default_transaction_isolation", str(default).upper()))
    durable = await subject.value("SHOW synchronous_commit")
    lossy = "a crash of the server loses transactions that were committed; set it to on"
    found.append(judged("synchronous_commit", str(durable), lossy, wrong=durable == "off", level="warning"))
    return found


async def _connections(subject: Subject) -> list[Finding]:
    limit = int(await subject.value("SHOW max_connections")) - int(
        await subject.value("SHOW superuser_reserved_connections")
    )
    role = int(await subject.value("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user"))
    return connections(subject, limit if role < 0 else min(limit, role), "put a pooler before the server")


async def _pooler(subject: Subject) -> list[Finding]:
    """A pooler in transaction mode gives transactions of one connection to several sessions of the server."""
    backends: set[int] = set()
    async with subject.engine.connect() as connection, subject.engine.connect() as other:

        async def look() -> None:
            async with connection.begin():
                answer = await connection.exec_driver_sql("SELECT pg_backend_pid()")
                backends.add(int(answer.scalar_one()))

        for _ in range(_TURNS):
            async with other.begin():  # takes the server connection that the last one had, where there is a pooler
                await other.exec_driver_sql("SELECT 1")
                await look()
            await look()
    server_port = await subject.value("SELECT inet_server_port()")
    if len(backends) > 1:
        value = "in transaction mode"
    elif server_port not in (None, subject.engine.url.port or _PORT):
        value = "perhaps: the server listens on another port"
    else:
        return [Finding("pooler", "none seen")]
    advice = "in transaction mode switch prepared statements off: statement_cache_size=0 (asyncpg), prepare_threshold=None (psycopg)"
    return [Finding("pooler", value, "note", advice)]


async def _replication(subject: Subject) -> list[Finding]:
    if await subject.value("SELECT pg_is_in_recovery()"):
        lag = await subject.value("SELECT extract(epoch FROM now() - pg_last_xact_replay_timestamp())")
        behind = "unknown" if lag is None else f"{float(lag):.1f} s since the last transaction"
        return as_replica(f"standby, {behind}")
    standbys = int(await subject.value("SELECT count(*) FROM pg_stat_replication"))
    return [Finding("role", f"primary of {standbys} standbys")]


async def _clock(subject: Subject) -> list[Finding]:
    return await clock(subject, "SELECT extract(epoch FROM clock_timestamp())")


async def _verification(subject: Subject) -> list[Finding]:
    await subject.value("SELECT pg_xact_status(pg_current_xact_id())")
    return [Finding("ambiguous_commit='verify'", "works: by the transaction's id")]


async def _stranger(subject: Subject) -> list[Finding]:
    """CockroachDB or YugabyteDB, whose settings are other ones."""
    default = str(await subject.value("SHOW default_transaction_isolation")).upper()
    advice = "little is known of it here; its own documentation tells what its settings are"
    return [
        Finding("server", str(await subject.value("SELECT version()")), "note", advice),
        Finding("default_transaction_isolation", default),
    ]


async def _idempotency_keys(subject: Subject) -> list[Finding]:
    return await idempotency_keys(subject, "now() - expires_at > 2 * (expires_at - created_at)")


DISTRIBUTED: Sequence[Check] = (_stranger, _clock)
CHECKS: Sequence[Check] = (
    _version,
    _settings,
    _connections,
    _pooler,
    _replication,
    _clock,
    _verification,
    _idempotency_keys,
    row_level_security,
)
