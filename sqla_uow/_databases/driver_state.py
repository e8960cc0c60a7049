"""Old names, until nobody uses them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sqla_uow._databases import database as _d
from sqla_uow._databases import interrupt as _i
from sqla_uow._databases import mariadb as _m
from sqla_uow._databases import sqlite as _s

if TYPE_CHECKING:
    from sqla_uow._databases.driver import State

__all__: list[str] = []


def _driver(name: str) -> Any:
    return _d.driver_of(SimpleNamespace(driver=name))  # type: ignore[arg-type]


def _of(connection: Any) -> Any:
    return _d.driver_of(connection.dialect)


def begin_now(connection: Any) -> None:
    _of(connection).begin_now(connection)


def listen_to_commit(connection: Any) -> Any:
    return _of(connection).listen_to_commit(connection)


def tell_next_results(raw: Any, failed: Any) -> Any:
    return _driver("asyncmy").tell_next_results(raw, failed)


def tell_raw_calls(driver: str, raw: Any, calls: Any) -> Any:
    return _driver(driver).tell_raw_calls(raw, calls)


def in_autocommit(connection: Any) -> bool:
    return bool(_of(connection).in_autocommit(connection))


def switched_to_autocommit(driver: str, raw: Any) -> bool:
    return bool(_driver(driver).switched_to_autocommit(raw))


def state_of(driver: str, raw: Any) -> State | None:
    state: State | None = _driver(driver).state(raw)
    return state


def in_transaction(connection: Any) -> bool:
    return bool(_of(connection).in_transaction(connection))


def idle_check(driver: str) -> Any:
    return _driver(driver).is_idle


def is_fit(driver: str, raw: Any) -> bool:
    return bool(_driver(driver).is_fit(raw))


def watch(connection: Any) -> Any:
    return _of(connection).watch(connection.raw)


def remember(connection: Any) -> None:
    _of(connection).keep_cancel_request(connection)


def explain(error: Any, driver: str) -> None:
    _driver(driver).explain(error)


def limit_statement(statement: str, seconds: float) -> str:
    return _m.MariaDB().limit(statement, seconds)


def restore_sqlite(dbapi_connection: Any, info: Any) -> None:
    _s.SQLite().restore(dbapi_connection, info)


def family_of(dialect: Any) -> str:
    return _d.system_of(dialect).family


settle, cut = _i.stop_statement, _i.break_link
