"""What the doctor asks MariaDB and MySQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_uow._doctor.idempotency import idempotency_keys
from sqla_uow._doctor.report import Finding, judged
from sqla_uow._doctor.subject import as_replica, clock, connections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqla_uow._doctor.subject import Check, Subject

__all__ = ["CHECKS"]


async def _variable(subject: Subject, name: str) -> str | None:
    row = await subject.row("SHOW VARIABLES LIKE :name", name=name)
    return None if row is None else str(row[1])


async def _version(subject: Subject) -> list[Finding]:
    return [Finding("server", str(await subject.value("SELECT version()")))]


async def _settings(subject: Subject) -> list[Finding]:
    found: list[Finding] = []
    snapshot = await _variable(subject, "innodb_snapshot_isolation")
    if snapshot is not None:
        advice = (
            "at REPEATABLE READ, the default, updates get lost without an error; set it to ON, or lock what you read with "
            "with_for_update()"
        )
        found.append(judged("innodb_snapshot_isolation", snapshot, advice, wrong=snapshot == "OFF", level="warning"))
    found.append(Finding("innodb_rollback_on_timeout", str(await _variable(subject, "innodb_rollback_on_timeout"))))
    found.append(Finding("innodb_lock_wait_timeout", f"{await _variable(subject, 'innodb_lock_wait_timeout')} s"))
    limit = float(await _variable(subject, "max_statement_time") or 0)
    advice = "ends statements of units too, which is not a conflict; give timeout= to the functions"
    found.append(judged("max_statement_time", f"{limit:g} s" if limit else "off", advice, wrong=limit > 0))
    level = await _variable(subject, "tx_isolation") or await _variable(subject, "transaction_isolation")
    found.append(Finding("default isolation", str(level).replace("-", " ")))
    flush = await _variable(subject, "innodb_flush_log_at_trx_commit")
    advice = "a crash of the machine loses transactions that were committed; set it to 1"
    found.append(judged("innodb_flush_log_at_trx_commit", str(flush), advice, wrong=flush != "1", level="warning"))
    return found


async def _connections(subject: Subject) -> list[Finding]:
    limit = int(await _variable(subject, "max_connections") or 0)
    own = int(await _variable(subject, "max_user_connections") or 0)
    return connections(subject, min(limit, own) if own else limit, "max_connections larger")


async def _cluster(subject: Subject) -> list[Finding]:
    if await _variable(subject, "wsrep_on") != "ON":
        return [Finding("Galera", "no")]
    state = await subject.row("SHOW STATUS LIKE 'wsrep_local_state_comment'")
    size = await subject.row("SHOW STATUS LIKE 'wsrep_cluster_size'")
    well = state is not None and state[1] == "Synced"
    return [
        Finding(
            "Galera",
            f"{'unknown' if state is None else state[1]}, {'?' if size is None else size[1]} nodes",
            "note" if well else "warning",
            "a conflict with another node shows at COMMIT: give functions retries"
            if well
            else "the node is not in step",
        )
    ]


async def _replication(subject: Subject) -> list[Finding]:
    read_only = await _variable(subject, "read_only")
    log = await _variable(subject, "log_bin")
    if read_only not in (None, "OFF", "0"):
        return as_replica("replica")
    return [Finding("role", f"primary, binary log {log}")]


async def _clock(subject: Subject) -> list[Finding]:
    return await clock(subject, "SELECT unix_timestamp(sysdate(6))")


async def _idempotency_keys(subject: Subject) -> list[Finding]:
    late = "timestampdiff(MICROSECOND, expires_at, utc_timestamp(6)) > "
    late += "2 * timestampdiff(MICROSECOND, created_at, expires_at)"
    return await idempotency_keys(subject, late)


CHECKS: Sequence[Check] = (_version, _settings, _connections, _cluster, _replication, _clock, _idempotency_keys)
