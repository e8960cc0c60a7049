"""Two tenants, and units of every kind that work for them at once, while all that can go wrong does.

What a unit sees and writes is told to `World.wrong` and not raised: an error might be swallowed by what is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse

from sqla_uow import UnitOfWorkManager, after_commit, current_session, transactional
from sqla_uow.errors import NoUnitError, SettingMissingError
from sqla_uow.testing import FaultPlan, cancel_at
from tests.kit.tenants import PARCELS, ROLE, tenant
from tests.starlette.client import app_of, client_of

if TYPE_CHECKING:
    import random

TENANTS = ("a", "b")
WRITE = text("INSERT INTO parcel (tenant, body) VALUES (:tenant, :body)")
COUNT = text("UPDATE tally SET n = n + 1 WHERE tenant = :tenant")
LEFT = text("SELECT coalesce(current_setting('app.tenant', true), ''), current_user")
LOOK = text("SELECT current_setting('app.tenant', true), tenant FROM parcel ORDER BY random() LIMIT 3")
# As a role may end its own sessions.
END_ITSELF = text("SELECT pg_terminate_backend(pg_backend_pid())")


class World:
    """What the units share.

    Args:
        engines: by name: "direct", "pooled" behind PgBouncer, and "faulty", which one unit at a time uses.
        replica: the engine of a replica of the direct one.
        dice: decide.
    """

    def __init__(self, engines: dict[str, Any], replica: Any, dice: random.Random) -> None:
        told: dict[str, Any] = {"settings": {"app.tenant": tenant.get}, "retries": 3, "timeout": 20}
        self.engines = engines
        self.dice = dice
        self.managers = {
            "direct": UnitOfWorkManager(engines["direct"], replicas=[replica], **told),
            "pooled": UnitOfWorkManager(engines["pooled"], role=ROLE, **told),
            "faulty": UnitOfWorkManager(engines["faulty"], **told),
        }
        self.wrong: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.one_at_a_time = asyncio.Lock()
        self.apps = {
            (name, atomic): self._client(manager, atomic=atomic)
            for name, manager in self.managers.items()
            for atomic in (False, True)
        }

    def _client(self, manager: Any, *, atomic: bool) -> Any:
        retries = {"retries": 2} if atomic else {}
        app = app_of(manager, self._endpoint(manager), atomic=atomic, settings=settings_of, **retries)
        return client_of(app)

    @property
    def units(self) -> int:
        """How many units have been begun, read sessions included."""
        counted = [manager.statistics() for manager in self.managers.values()]
        return sum(one.attempts + one.readings for one in counted)

    # -- what is looked at

    async def look(self, session: Any, whose: str, kind: str) -> None:
        """See only what is of this tenant, and something of it."""
        rows = (await session.execute(LOOK)).all()
        if not rows or {value for row in rows for value in row} != {whose}:
            self.wrong.append(f"{kind} of {whose} saw {rows}")

    async def write(self, session: Any, whose: str, kind: str) -> None:
        await session.execute(WRITE, {"tenant": whose, "body": kind})

    async def look_past(self, name: str) -> None:
        """Look at a connection that no unit has: nothing was left on it, and it sees nothing."""
        async with self.engines[name].connect() as connection:
            left = (await connection.execute(LEFT)).one()
            expected = ("", "postgres" if name == "pooled" else ROLE)
            if tuple(left) != expected:
                self.wrong.append(f"a connection of {name} came back with {left}")
            if name != "pooled" and (rows := (await connection.execute(PARCELS)).all()):
                self.wrong.append(f"past the manager of {name}: {rows[:3]}")

    # -- kinds of units

    async def writing(self, manager: Any, whose: str) -> None:
        @transactional(using=manager)
        async def work() -> None:
            session = current_session(manager)
            await self.look(session, whose, "writing")
            await self.write(session, whose, "writing")
            if self.dice.random() < 0.05:
                await session.execute(END_ITSELF)
            await self.look(session, whose, "writing")

        await work()

    async def counting(self, manager: Any, whose: str) -> None:
        """Conflicts with others of its tenant, and is retried."""

        @transactional(using=manager, isolation="SERIALIZABLE")
        async def work() -> None:
            session = current_session(manager)
            await self.look(session, whose, "counting")
            await session.execute(COUNT, {"tenant": whose})
            await self.write(session, whose, "counting")

        await work()

    async def changing(self, manager: Any, whose: str) -> None:
        """Asks for another tenant in each attempt."""
        runs = 0

        @transactional(using=manager)
        async def work() -> None:
            nonlocal runs
            runs += 1
            mine, other = tenant.get(), other_than(tenant.get())
            session = current_session(manager)
            await self.look(session, mine, f"attempt {runs}")
            await self.write(session, mine, "changing")
            tenant.set(other)
            if runs == 1:
                await session.execute(END_ITSELF)
                await session.execute(LOOK)

        await work()

    async def reading(self, manager: Any, whose: str) -> None:
        async with manager.begin(read_only=True) as unit:
            await self.look(unit.session, whose, "reading")
            await self.look(unit.session, whose, "reading")

    async def nested(self, manager: Any, whose: str) -> None:
        async with manager.begin() as unit:
            with contextlib.suppress(KeyError):
                async with manager.begin(propagation="nested"):
                    await self.look(unit.session, whose, "savepoint")
                    raise KeyError
            await self.look(unit.session, whose, "behind a savepoint")
            async with manager.begin(propagation="nested"):
                await self.write(unit.session, whose, "nested")

    async def beside(self, manager: Any, whose: str) -> None:
        async with manager.begin() as outer:
            await self.look(outer.session, whose, "outer")
            tenant.set(other_than(whose))
            async with manager.begin(propagation="requires_new") as inner:
                await self.look(inner.session, other_than(whose), "requires_new")
                await self.write(inner.session, other_than(whose), "requires_new")
            await self.look(outer.session, whose, "outer, after requires_new")

    async def hooked(self, manager: Any, whose: str) -> None:
        async def hook() -> None:
            async with manager.begin() as unit:
                await self.look(unit.session, whose, "hook")
                await self.write(unit.session, whose, "hook")

        with manager.activate():
            async with manager.begin() as unit:
                await self.write(unit.session, whose, "hooked")
                after_commit(hook)

    async def scoped(self, manager: Any, whose: str) -> None:
        """A read session over changes of the tenant; one that was kept must not read."""
        async with manager.scope():
            kept = current_session(manager)
            await self.look(kept, whose, "read session")
            tenant.set(other_than(whose))
            try:
                rows = (await kept.execute(LOOK)).all()
            except NoUnitError:
                pass
            else:
                self.wrong.append(f"a session kept over a change of the tenant saw {rows}")
            await self.look(current_session(manager), other_than(whose), "read session after a change")
            async with manager.begin() as unit:
                await self.write(unit.session, other_than(whose), "after a read session")
            tenant.set(whose)
            await self.look(current_session(manager), whose, "read session after a unit")

    async def background(self, manager: Any, whose: str) -> None:
        """A scope's tenant, where the context has none; a task that outlives the scope has nobody's."""

        async def late() -> None:
            try:
                async with manager.begin() as unit:
                    rows = (await unit.session.execute(LOOK)).all()
                self.wrong.append(f"a task behind a scope of {whose} saw {rows}")
            except SettingMissingError:
                pass

        async def scope_and_task() -> None:
            async with manager.scope(settings={"app.tenant": whose}):
                await self.look(current_session(manager), whose, "read session of a scope's tenant")
                async with manager.begin() as unit:
                    await self.look(unit.session, whose, "unit of a scope's tenant")
                behind = asyncio.create_task(late())
            await behind

        await for_nobody(scope_and_task())

    async def timed(self, manager: Any, whose: str) -> None:
        async with manager.begin(timeout=0.05, isolation=self.dice.choice([None, "REPEATABLE READ"])) as unit:
            await self.look(unit.session, whose, "timed")
            await unit.session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": self.dice.choice([0, 0.2])})
            await self.write(unit.session, whose, "timed")

    async def request(self, manager: Any, whose: str) -> None:
        """A request whose tenant only its ASGI scope knows."""
        name = next(name for name, one in self.managers.items() if one is manager)
        client = self.apps[name, self.dice.random() < 0.7]
        response = await for_nobody(client.post("/endpoint", headers={"x-tenant": whose}))
        if response.status_code == 200 and response.json() != [whose]:
            self.wrong.append(f"a request of {whose} was answered {response.json()}")

    def _endpoint(self, manager: Any) -> Any:
        async def late(whose: str) -> None:
            try:
                async with manager.begin() as unit:
                    rows = (await unit.session.execute(LOOK)).all()
                self.wrong.append(f"a background task of {whose} saw {rows}")
            except SettingMissingError:
                pass

        async def endpoint(request: Any) -> Any:
            whose = request.headers["x-tenant"]

            @transactional(using=manager)
            async def work() -> None:
                session = current_session(manager)
                await self.look(session, whose, "request")
                await self.write(session, whose, "request")

            await self.look(current_session(manager), whose, "request's session")
            await work()
            seen = sorted({row.tenant for row in await current_session(manager).execute(LOOK)})
            return JSONResponse(seen, background=BackgroundTask(late, whose))

        return endpoint

    # -- running

    async def one(self) -> None:
        """Run one call of a random kind for a random tenant, with a random fault."""
        dice = self.dice
        kind = dice.choice(KINDS)
        name = dice.choices(["direct", "pooled", "faulty"], [5, 4, 1])[0]
        whose = dice.choice(TENANTS)
        manager = self.managers[name]
        self.kinds[kind.__name__] += 1

        async def call() -> None:
            tenant.set(whose)
            await kind(self, manager, whose)

        try:
            if name == "faulty":
                async with self.one_at_a_time:
                    fault, at = dice.choice(FAULTS)
                    with (
                        contextlib.suppress(AssertionError),
                        FaultPlan(manager, fault, at=at),
                    ):  # no unit may come there
                        await asyncio.create_task(call())
            elif dice.random() < 0.25:
                await cancel_at(dice.randint(1, 40), call())
            else:
                await asyncio.create_task(call())
        except Exception as error:  # noqa: BLE001  # whatever the faults have led to; what matters is what was seen
            self.errors[type(error).__name__] += 1
        if dice.random() < 0.1:
            with contextlib.suppress(Exception):
                await self.look_past(name)

    async def work(self, units: int) -> None:
        """Run calls until so many units have been begun."""
        while self.units < units and not self.wrong:
            await self.one()


def other_than(whose: str) -> str:
    """Return the other tenant."""
    return TENANTS[whose == TENANTS[0]]


def settings_of(scope: Any) -> dict[str, str]:
    """Return the tenant of a request."""
    return {"app.tenant": dict(scope["headers"])[b"x-tenant"].decode()}


async def for_nobody(call: Any) -> Any:
    """Run something in a context in which nobody has said whose work it is."""
    return await asyncio.create_task(call, context=contextvars.Context())


KINDS = (
    World.writing, World.counting, World.changing, World.reading, World.nested, World.beside, World.hooked, World.scoped,
    World.background, World.timed, World.request,
)  # fmt: skip
FAULTS = [
    ("conflict", "statement"),
    ("conflict", "commit"),
    ("lost", "statement"),
    ("lost", "commit"),
    ("lock timeout", "flush"),
]
