"""Which settings a connection of PostgreSQL comes back with, other than it was taken with."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent
from sqlalchemy import event

from sqla_uow._databases.database import WITHIN, family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["SettingChanges"]

_SENT = re.compile(
    r"""\bSET\s+(?:SESSION\s+)?("?[a-z_][\w$]*"?(?:\."?[a-z_][\w$]*"?)+)|\bset_config\(\s*'([a-z_][\w$]*(?:\.[a-z_][\w$]*)+)'""",
    re.IGNORECASE,
)
# Neither a role nor a setting with a dot is among pg_settings.
_ASK = (
    "SELECT name, setting FROM pg_settings WHERE source = 'session' UNION ALL "
    "SELECT name, coalesce(current_setting(name, true), '') FROM unnest(string_to_array('{names}', ' ')) AS name"
)


class SettingChanges:
    """Compares the settings of each connection that is returned with those that it was taken with.

    Args:
        engine: whose connections these are.
        names: to be looked at, besides those of the server's own settings and those that statements name.
        where: says where a connection is being taken.

    Attributes:
        found: where each connection was taken that came back with others.
        changed: the names of what was changed.

    Raises:
        ValueError: this is not PostgreSQL.
    """

    def __init__(self, engine: Engine, names: Iterable[str], where: Callable[[], str]) -> None:
        if family_of(engine.dialect) != "postgresql":
            raise ValueError(
                f"assert_no_leaks() was asked for settings=True on {engine.dialect.name}; leave it out, it knows those of PostgreSQL"
            )
        self._engine = engine
        self._within = WITHIN in engine.get_execution_options()
        self._names = {"role", *names}
        self._where = where
        self._before: dict[ConnectionPoolEntry, tuple[str, dict[str, str]]] = {}
        self.changed: set[str] = set()
        self.found: list[str] = []

    @contextmanager
    def watched(self) -> Generator[None]:
        """Compare in the block."""
        pool = self._engine.pool
        listeners: list[tuple[Any, str, Callable[..., None]]] = [
            (pool, "checkout", self._taken), (pool, "checkin", self._returned),
            (self._engine, "before_cursor_execute", self._sent),
        ]  # fmt: skip
        for listener in listeners:
            event.listen(*listener)
        try:
            yield
        finally:
            for listener in listeners:
                event.remove(*listener)

    def _sent(self, _connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        self._names |= {(one or other).replace('"', "") for one, other in _SENT.findall(statement)}

    def _taken(self, connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        self._before[record] = self._where(), self._settings(connection)

    def _returned(self, connection: Any, record: ConnectionPoolEntry) -> None:
        if connection is None or record not in self._before:
            return
        where, before = self._before.pop(record)
        after = self._settings(connection)
        changed = {name for name in before.keys() | after.keys() if before.get(name, "") != after.get(name, "")}
        if changed:
            self.changed |= changed
            self.found.append(where)

    def _settings(self, connection: Any) -> dict[str, str]:
        if not getattr(getcurrent(), "__sqlalchemy_greenlet_provider__", False):
            return {}  # nothing can be asked, as when the garbage collector returns a connection
        cursor = connection.cursor()
        try:
            cursor.execute(_ASK.format(names=" ".join(sorted(self._names))))
            return {str(name): str(value) for name, value in cursor.fetchall()}
        finally:
            cursor.close()
            if not self._within:
                connection.rollback()
