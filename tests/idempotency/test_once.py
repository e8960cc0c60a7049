"""A function that returns to who calls it again what it has returned before."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from sqla_uow import current_session, errors, transactional
from tests.idempotency.test_claim import add_one
from tests.kit.models import Account


def key_of(request, *_rest, **_more):
    """Return the key of a call."""
    return request


async def test_who_calls_again_gets_the_result(manager, keys, balance):
    """The work is done once; what is returned is the same, to the first one too."""

    @transactional
    @keys.once(space="deposit", key=key_of)
    async def deposit(request, amount=1):
        await add_one()
        return {"amount": amount, "what": ("a", None, "Grün")}

    first = await deposit("r1", amount=5)
    assert first == {"amount": 5, "what": ["a", None, "Grün"]}
    assert await deposit("r1", amount=6) == first
    assert await deposit("r2", amount=7) != first
    assert await balance() == 2
    async with manager.begin(read_only=True):
        assert await keys.result("deposit", "r1") == first
        assert await keys.result("deposit", "r3") is None


async def test_nothing_is_a_result_too(manager, keys, balance):
    """A function that returns nothing is not run again; a message's record has no result."""

    @transactional
    @keys.once(space="deposit", key=key_of)
    async def deposit(request):
        await add_one()

    assert await deposit("r1") is await deposit("r1") is None
    assert await balance() == 1
    async with manager.begin():
        await keys.claim("orders", "a")
        assert await keys.result("orders", "a") is None
        assert await keys.result("deposit", "r1") is None


async def test_calls_at_the_same_time(manager, keys, balance):
    """One of them works, the others wait for it, as their retries allow."""

    @transactional(retries=100)
    @keys.once(space="deposit", key=key_of)
    async def deposit(request):
        await add_one()
        await asyncio.sleep(0.02)
        return 5

    assert await asyncio.gather(*(deposit("r1") for _ in range(10))) == [5] * 10
    assert await balance() == 1


@pytest.mark.parametrize("nested", [False, True])
async def test_an_error_that_is_swallowed_leaves_no_record(db, manager, keys, nested):
    """Without a savepoint the unit cannot commit any more; with one it can, and the key is free."""

    @keys.once(space="deposit", key=key_of)
    async def deposit(request):
        current_session().add(Account(id=2, balance=1))
        await current_session().flush()
        raise ZeroDivisionError

    @transactional
    async def outer():
        with contextlib.suppress(ZeroDivisionError):
            await (transactional(propagation="nested")(deposit) if nested else deposit)("r1")

    with contextlib.nullcontext() if nested else pytest.raises(errors.RollbackOnlyError):
        await outer()
    assert await db.rows("SELECT id FROM account") == [(1,)]
    assert await db.scalar("SELECT count(*) FROM uow_idempotency") == 0


async def test_a_call_that_is_another(manager, keys):
    """What the key stands for is compared where the function says what that is."""

    @transactional
    @keys.once(space="deposit", key=key_of, fingerprint=lambda request, amount: str(amount).encode())
    async def deposit(request, amount):
        return amount

    assert await deposit("r1", 5) == 5
    assert await deposit("r1", 5) == 5
    with pytest.raises(errors.KeyReusedError):
        await deposit("r1", 6)


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object()])
async def test_a_result_that_is_no_json(db, manager, keys, value):
    """It is refused with the first call, which is rolled back."""

    @transactional
    @keys.once(space="deposit", key=key_of)
    async def deposit(request):
        await add_one()
        return value

    with pytest.raises((TypeError, ValueError), match=r"^deposit\(\) returned what is no JSON"):
        await deposit("r1")
    assert await db.scalar("SELECT balance FROM account") == 0


@pytest.mark.parametrize("key", ["", None, 5])
async def test_a_key_that_is_none(manager, keys, key):
    """It is refused: all calls without one would be the same call."""

    @transactional
    @keys.once(space="deposit", key=lambda: key)
    async def deposit():
        return 1

    with pytest.raises(TypeError, match=r"^the key of deposit\(\) is "):
        await deposit()


def test_what_can_be_decorated(keys_only):
    """An `async def` function."""
    with pytest.raises(TypeError, match=r"^once\(\) got plain, which is not an 'async def' function"):

        @keys_only.once(space="deposit", key=key_of)
        def plain():
            return 1
