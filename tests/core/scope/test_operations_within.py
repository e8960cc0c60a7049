"""Operations within operations: a flush that a listener makes another call in is one operation until its end."""

from __future__ import annotations

import asyncio

import pytest

from sqla_uow._tasks.owner import Owner
from sqla_uow._transaction.doom import Doom
from sqla_uow._transaction.hooks import Hooks
from sqla_uow.errors import TaskBoundaryError

pytestmark = pytest.mark.drivers("sqlite")  # what is about no database


async def test_what_lies_within_an_operation_does_not_end_it():
    """A child task is refused until the outer one has ended, and not only until the inner one has."""
    owner = Owner("the unit", Doom(Hooks()))
    outer = owner.hold()
    owner.let_go(owner.hold())

    async def child():
        owner.check()

    with pytest.raises(TaskBoundaryError, match="has a statement in flight"):
        await asyncio.create_task(child())
    assert owner.busy() is asyncio.current_task()
    owner.let_go(outer)
    assert owner.busy() is None
