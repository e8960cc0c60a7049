"""A COMMIT whose answer is lost on the way, before or after the server has applied it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from sqla_uow import UnitOfWorkManager, current_unit, transactional
from tests.kit.models import Account
from tests.kit.waiting import until

if TYPE_CHECKING:
    from tests.servers import Proxy, Trigger

COMMIT = {"asyncpg": b"COMMIT;\0", "psycopg": b"COMMIT\0", "asyncmy": b"\x03COMMIT", "aiomysql": b"\x03COMMIT"}
"""What the drivers send, with what stands around it: the word alone is also in the marker table's name."""


class Wire:
    """One account behind a proxy, a pool of one connection, and a function that adds 1 and counts its runs."""

    def __init__(self, db: Any, proxy: Proxy) -> None:
        self.db = db
        self.proxy = proxy
        self.engine = db.engine(port=proxy.port, pool_size=1, max_overflow=0, pool_timeout=5)
        self._managers = {mode: UnitOfWorkManager(self.engine, ambiguous_commit=mode) for mode in ("raise", "verify")}
        self.connected = 0
        self.units: list[Any] = []
        self.hooks: list[str] = []
        event.listen(self.engine.sync_engine, "connect", self._count)

    def _count(self, *_args: object) -> None:
        self.connected += 1

    def on_commit(self, action: Any, *, applied: bool) -> Trigger:
        """Do something to the next COMMIT; `applied` by then, or not."""
        return self.proxy.on_client_bytes(COMMIT[self.db.driver], action, after_server=applied)

    async def add_one(self, *, ambiguous_commit: Any = "raise", **options: Any) -> None:
        """Run the function with these options, and five retries."""
        manager = self._managers[ambiguous_commit]
        await transactional(using=manager, **({"retries": 5} | options))(self._body)(manager)

    async def _body(self, manager: UnitOfWorkManager[Any]) -> None:
        unit = current_unit(manager)
        self.units.append(unit)
        unit.after_commit(self.hooks.append, "after commit")
        unit.after_rollback(self.hooks.append, "after rollback")
        account = await unit.session.get_one(Account, 1)
        if not unit.read_only:
            account.balance += 1

    async def balance(self) -> int:
        """Return the committed one, read past the proxy."""
        return await self.db.scalar("SELECT balance FROM account")

    async def until_left(self) -> None:
        """Return when the server has nothing open any more but idle connections."""
        await until(self.db.is_idle, seconds=5)
