"""The log as data: the same texts, with fields for who reads JSON."""

from __future__ import annotations

import json
import logging

import pytest
from sqlalchemy import text

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session, errors, transactional
from sqla_uow._log import log
from sqla_uow._retry.controller import Controller
from tests.kit.logged import fields_of

KNOWN = {
    "function", "manager", "attempt", "attempts", "reason", "code", "wait", "elapsed", "status", "error", "hook", "width",
    "wasted", "joins", "replica",
}  # fmt: skip


def fields(found):
    """Return our fields of a record; each of them can be written as JSON, and is in the table of the docs."""
    ours = fields_of(found)
    assert set(ours) <= KNOWN
    json.dumps(ours)
    return ours


async def test_a_retry_and_giving_up_carry_their_facts(db, trouble, caplog):
    """At INFO and at WARNING: reason, code, attempt, attempts, wait; and the texts for people."""
    caplog.set_level(logging.INFO, logger="sqla_uow")
    manager = UnitOfWorkManager(trouble.engine(), name="bank")

    @transactional(using=manager, retries=1, isolation=trouble.isolation, retry=RetryPolicy(rng=lambda _, high: high))
    async def write():
        await trouble.settle()
        await trouble.strike(current_session(manager))

    with pytest.raises(errors.ConflictError) as caught:
        await write()
    retry, gave_up = [found for found in caplog.records if found.name == "sqla_uow"]
    spelled = f"{trouble.reason} {trouble.code}"
    same = {
        "function": "write()", "manager": "bank", "attempts": 2, "reason": trouble.reason, "code": trouble.code,
    }  # fmt: skip
    assert (retry.levelno, retry.module, retry.getMessage()) == (
        logging.INFO, "retry_or_raise", f"write(): attempt 1 of 2 failed ({spelled}); again in 10.0 ms",
    )  # fmt: skip
    assert fields(retry) == same | {"attempt": 1, "wait": 0.01}
    elapsed = caught.value.elapsed
    assert (gave_up.levelno, gave_up.getMessage()) == (
        logging.WARNING, f"write(): gave up after 2 attempts and {elapsed:.3f} s ({spelled})",
    )  # fmt: skip
    assert fields(gave_up) == same | {"attempt": 2, "elapsed": elapsed}


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_an_unknown_commit_carries_its_status(wire, caplog):
    """At ERROR, with the class of what was met, and not its text."""
    wire.on_commit("cut", applied=True)
    with pytest.raises(errors.AmbiguousCommitError) as caught:
        await wire.add_one()
    (found,) = [found for found in caplog.records if found.levelno == logging.ERROR and found.name == "sqla_uow"]
    assert found.getMessage() == "COMMIT of Wire._body() was sent and its answer is unknown"
    assert fields(found) == {
        "function": "Wire._body()", "status": "ambiguous", "attempt": 1, "error": type(caught.value.__cause__).__name__,
    }  # fmt: skip


async def test_a_joined_calls_retries_are_told_at_debug(db, caplog):
    """Who joins whom."""
    caplog.set_level(logging.DEBUG, logger="sqla_uow")
    manager = UnitOfWorkManager(db.engine())

    @transactional(using=manager, retries=3)
    async def inner():
        await current_session(manager).execute(text("SELECT 1"))

    async with manager.begin():
        await inner()
    (found,) = [found for found in caplog.records if found.name == "sqla_uow"]
    assert (found.levelno, found.getMessage()) == (logging.DEBUG, "inner() joins begin(), which alone retries")
    assert fields(found) == {"function": "inner()", "joins": "begin()"}


async def test_a_hook_that_fails_carries_its_name_and_its_traceback(db, caplog):
    """A hook after a rollback: the record names it, and shows where it raised."""
    manager = UnitOfWorkManager(db.engine())

    def fail():
        raise ZeroDivisionError

    async with manager.begin() as unit:
        unit.after_rollback(fail)
        unit.doom()
    (found,) = caplog.records
    name = "test_a_hook_that_fails_carries_its_name_and_its_traceback.<locals>.fail"
    assert found.getMessage() == f"after_rollback hook {name} failed; the rollback itself is done"
    assert fields(found) == {"hook": name, "error": "ZeroDivisionError"}
    assert found.exc_info[0] is ZeroDivisionError


def test_turns_carry_the_width(caplog):
    """Taking turns, and the end of it: the function, the width, and the share of time that went into conflicts."""
    caplog.set_level(logging.INFO, logger="sqla_uow")
    now = [0.0]
    controller = Controller(lambda: now[0])
    controller.who = "sell()"
    for _ in range(100):
        now[0] += 0.02
        controller.conflicted(now[0] - 0.01, 0.01, 1, 1)
    found = caplog.records[0]
    assert found.getMessage() == "sell(): 100 % of the time went into conflicts; calls take turns"
    assert fields(found) == {"function": "sell()", "width": 1, "wasted": 1.0}


def test_a_record_that_is_off_makes_nothing(caplog):
    """Where the level is off, nothing is formatted, and no field is looked at."""

    class Costly:
        def __str__(self):
            raise AssertionError

        @property
        def __class__(self):
            raise AssertionError

    caplog.set_level(logging.WARNING, logger="sqla_uow")
    log(logging.INFO, "%s", Costly(), function=Costly())
    assert caplog.records == []
