"""Hooks of one kind, where there are none of the others."""

from __future__ import annotations

import contextlib

import pytest

from sqla_uow import (
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    before_commit,
    current_session,
    errors,
    transactional,
)


@pytest.fixture
def manager(db):
    """Provide a manager that is activated."""
    manager = UnitOfWorkManager(db.engine())
    with manager.activate():
        yield manager


KINDS = (after_commit, before_commit, after_rollback)


@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("outer", KINDS)
async def test_a_savepoint_drops_what_was_registered_in_it(manager, outer, inner):
    """Each kind is counted for itself."""
    calls = []

    @transactional
    async def work():
        for name in "ab":
            outer(calls.append, f"outer {name}")
        with contextlib.suppress(KeyError):
            async with current_session().begin_nested():
                inner(calls.append, "inner")
                raise KeyError

    await work()
    due = [] if outer is after_rollback else ["outer a", "outer b"]
    undone = ["inner"] if inner is after_rollback else []
    assert calls == due + undone


@pytest.mark.parametrize("register", KINDS)
@pytest.mark.drivers("sqlite")
def test_code_without_an_event_loop_has_no_unit(db, register):
    """In a thread, say: told so, like everybody outside a unit."""
    with UnitOfWorkManager(db.engine()).activate(), pytest.raises(errors.NoUnitError):
        register(print)


@pytest.mark.parametrize("register", [after_commit, after_rollback])
async def test_many_hooks_are_no_endless_chain(manager, register):
    """All that were registered run, however many; only a chain of hooks that register hooks is cut off."""
    calls = []

    @transactional
    async def work():
        for number in range(250):
            register(calls.append, number)
        if register is after_rollback:
            raise KeyError

    with contextlib.suppress(KeyError):
        await work()
    assert calls == list(range(250))
