"""Random requests with keys, against a dictionary."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import MetaData
from starlette.responses import JSONResponse

from sqla_uow import UnitOfWorkManager, after_commit, current_unit
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow_starlette import Idempotency, exception_handlers
from tests.starlette.client import add, app_of, client_of
from tests.starlette.keyed import caller, key

CASES = 30
OUTCOMES = ["done", "done", "declined", "fails", "doomed", "hook fails"]
WHO, KEYS, BODIES = st.sampled_from(["ann", "bob"]), st.sampled_from(["k1", "k2", "K1"]), st.sampled_from([b"5", b"6"])
steps = st.one_of(
    st.tuples(st.just("send"), WHO, KEYS, BODIES, st.sampled_from(OUTCOMES)),
    st.tuples(st.just("send"), WHO, KEYS, BODIES, st.sampled_from(OUTCOMES)),
    st.tuples(st.just("together"), WHO, KEYS, BODIES, st.integers(2, 6)),
    st.tuples(st.just("expire")),
    st.tuples(st.just("purge")),
)


async def fail():
    """Be a hook that fails."""
    raise OSError


class Bench:
    """Two applications on one database, as two processes, and what they should do."""

    def __init__(self, db):
        self.db = db
        metadata = MetaData()
        self.metadata = metadata
        self.keys = IdempotencyKeys(metadata)
        self.managers = [UnitOfWorkManager(db.engine(pool_size=2, max_overflow=0)) for _ in range(2)]
        self.runs = 0

    async def prepare(self):
        await self.db.create_tables()
        async with self.db.outside() as connection:
            await connection.run_sync(self.metadata.create_all)
            await connection.commit()

    def app(self, manager):
        async def endpoint(request):
            body = (await request.body()).decode()
            self.runs += 1
            run, outcome = self.runs, request.headers["x-outcome"]
            await add(run)
            if outcome == "fails":
                raise ZeroDivisionError
            if outcome == "doomed":
                current_unit().doom()
            if outcome == "hook fails":
                after_commit(fail)
            return JSONResponse([run, body], 402 if outcome == "declined" else 201)

        idempotency = Idempotency(self.keys, caller=caller, wait=20)
        return app_of(
            manager, endpoint, atomic=True, retries=20, idempotency=idempotency, exception_handlers=exception_handlers
        )

    async def check(self, program):
        """Run it, and compare what is answered, and what is there, after each step."""
        await self.db.run("DELETE FROM account", "DELETE FROM uow_idempotency")
        self.runs = 0
        model, worked = {}, 0
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client_of(self.app(manager))) for manager in self.managers]
            for number, (what, *step) in enumerate(program):
                before = self.runs
                if what == "expire":
                    await self.db.run("UPDATE uow_idempotency SET expires_at = created_at")
                    model.clear()
                elif what == "purge":
                    await self.keys.purge(self.managers[0])
                elif what == "send":
                    worked += await self.send(clients[number % 2], model, *step)
                else:
                    who, name, body, count = step
                    answers = await asyncio.gather(
                        *(self.post(clients[n % 2], who, name, body, "done") for n in range(count))
                    )
                    kept = model.get((who, name))
                    if kept is None:
                        kept = model[who, name] = (body, [before + 1, body.decode()])
                        worked += 1
                        assert self.runs == before + 1
                    expected = (201, kept[1]) if kept[0] == body else (422, "idempotency-key-reused")
                    assert {told(answer) == expected for answer in answers} == {True}, answers
                assert await self.db.scalar("SELECT count(*) FROM account") == worked
                assert await self.db.scalar("SELECT count(*) FROM uow_idempotency") >= len(model)
        assert [manager.engine.pool.checkedout() for manager in self.managers] == [0, 0]

    async def send(self, client, model, *step):
        """Send one; return how often it is worked."""
        who, name, body, outcome = step
        before = self.runs
        answer = await self.post(client, who, name, body, outcome)
        kept = model.get((who, name))
        if kept is not None:
            assert self.runs == before
            assert told(answer) == ((201, kept[1]) if kept[0] == body else (422, "idempotency-key-reused"))
            return 0
        assert self.runs == before + 1
        result = [self.runs, body.decode()]
        if outcome in ("done", "hook fails"):
            model[who, name] = (body, result)
        if outcome == "hook fails":
            assert told(answer) == (500, "committed-hook-failed")
        elif outcome == "fails":
            assert answer.status_code == 500
        else:
            assert told(answer) == (402 if outcome == "declined" else 201, result)
        return outcome in ("done", "hook fails")

    async def post(self, client, *step):
        who, name, body, outcome = step
        headers = key(name, Authorization=who, **{"X-Outcome": outcome})
        return await client.post("/endpoint", headers=headers, content=body)


def told(answer):
    """Return the status, and the body or its code."""
    document = answer.json()
    return answer.status_code, document["code"] if isinstance(document, dict) else document


@pytest.mark.timeout(120)
def test_keys_are_a_dictionary(driver, databases):
    """Who asks again gets what is in it, who asks with another body is refused, and all else runs."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        bench = Bench(databases.make(driver, Path(folder)))
        runner.run(bench.prepare())

        @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(steps, min_size=1, max_size=12))
        def check(program):
            runner.run(bench.check(program))

        try:
            check()
        finally:
            runner.run(bench.db.dispose())
