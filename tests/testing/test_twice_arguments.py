"""`run_twice` finds what a function does to its arguments: another attempt would be given what is left of them."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import BaseModel

from sqla_uow import UnitOfWorkManager, before_commit, current_session, errors, transactional
from sqla_uow.testing import run_twice
from tests.kit.models import Account, Note

pytestmark = pytest.mark.drivers("sqlite")


@pytest.fixture(autouse=True)
def manager(db):
    """Activate a manager, without retries: no conflict is needed."""
    with UnitOfWorkManager(db.engine()).activate() as manager:
        yield manager


class Model(BaseModel):
    balance: int | None = 50


@dataclasses.dataclass
class Body:
    balance: int | None = 50


BODIES = {
    "dict": (lambda: {"id": 1, "balance": 50}, lambda body: body.pop("balance")),
    "list": (lambda: [50], lambda body: body.pop()),
    "set": (lambda: {50}, lambda body: body.pop()),
    "model": (Model, lambda body: setattr(body, "balance", None)),
    "dataclass": (Body, lambda body: setattr(body, "balance", None)),
    "inside": (lambda: {"rows": [1, 2]}, lambda body: body["rows"].clear()),
}


@pytest.mark.parametrize(("make", "change"), BODIES.values(), ids=list(BODIES))
@pytest.mark.parametrize("fails", [False, True])
async def test_an_argument_that_is_changed(db, make, change, fails):
    """It is named, and nothing is stored by half; also where the run in vain fails behind it."""

    @transactional
    async def work(body, other):
        current_session().add(Account(id=1, balance=1))
        change(body)
        if fails:
            raise KeyError

    with pytest.raises(
        AssertionError, match=r"^work\(\) changed its argument 'body' in the run in vain, .* change a copy"
    ):
        await run_twice(work)(make(), other=[1])
    assert await db.scalar("SELECT count(*) FROM account") == 0


async def test_an_iterator_that_is_used_up(db):
    """As after a conflict."""

    @transactional
    async def work(rows):
        current_session().add_all([Note(text=str(row)) for row in rows])

    with pytest.raises(errors.InstanceReuseError, match=r"^argument 'rows' of work\(\) is an iterator \(generator\)"):
        await run_twice(work)(number for number in range(3))
    await run_twice(work)(range(3))
    assert await db.scalar("SELECT count(*) FROM note") == 3


async def test_what_cannot_be_compared_is_left_alone(db):
    """Rows, and objects whose copies are not equal to them."""

    @transactional
    async def work(rows, body):
        current_session().add(Note(text=rows[0].text))
        body["seen"] = True

    await run_twice(work)([Note(text="of nobody")], {"key": object()})
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_a_method(db):
    """Its object may remember things."""

    @dataclasses.dataclass
    class Service:
        calls: int = 0

        @transactional
        async def work(self):
            self.calls += 1
            current_session().add(Note(text="written"))

    service = Service()
    await run_twice(service.work)()
    assert service.calls == 2
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_hooks_of_the_last_flush_run_in_vain_too(db):
    """What they do is done twice, and found."""
    calls = []

    async def hook():
        calls.append("hook")
        current_session().add(Account(id=len(calls)))

    @transactional
    async def work():
        before_commit(hook)

    await run_twice(work)()
    assert calls == ["hook", "hook"]
    assert await db.rows("SELECT id FROM account") == [(2,)]
