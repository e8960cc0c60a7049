"""A message is worked once, however often its broker delivers it."""

from __future__ import annotations

import asyncio

import pytest

from sqla_uow.errors import ConflictError, KeyReusedError
from tests.consumers.work import working
from tests.kit.brokers import need_clients
from tests.kit.waiting import until

need_clients()

from tests.consumers.clients import CLIENTS  # noqa: E402  # needs the line above

pytestmark = pytest.mark.parametrize("client", CLIENTS)


async def worked(db):
    """Return what was worked: id and amount of each time."""
    return await db.rows("SELECT message, amount FROM worked ORDER BY id")


async def test_a_message_that_comes_later_once_more(db, consuming, post):
    """It is acknowledged without work."""
    async with consuming(working()) as consumer:
        await post.send("m-1", b"5")
        await until(lambda: consumer.outcomes == [True])
        await post.send("m-1", b"5")
        await until(lambda: consumer.outcomes == [True, False])
    assert await post.left() == 0
    assert await worked(db) == [("m-1", 5)]


async def test_a_message_that_comes_twice_at_once(db, consuming, post):
    """Whoever comes second is refused and left to redelivery, until the first one has ended."""
    first_is_in, go_on = asyncio.Event(), asyncio.Event()

    async def inside():
        first_is_in.set()
        await go_on.wait()

    # One message each time: NATS would go on sending to the one that has asked for more, and is busy.
    async with consuming(working(inside), 2, at_once=1) as consumer:
        await post.send("m-1", b"5")
        await first_is_in.wait()
        await post.send("m-1", b"5")
        if db.family == "sqlite":  # which lets the second one wait for its turn to write
            await until(lambda: consumer.started == 2)
        else:
            await until(lambda: ConflictError in consumer.outcomes)
        go_on.set()
        await until(lambda: False in consumer.outcomes)
    assert [outcome for outcome in consumer.outcomes if outcome is not ConflictError] == [True, False]
    assert await post.left() == 0
    assert await worked(db) == [("m-1", 5)]


async def test_work_that_fails_at_first(db, consuming, post):
    """The record goes with the work, and the message comes again."""
    failures = [ZeroDivisionError, ConnectionError]

    async def inside():
        if failures:
            raise failures.pop()

    async with consuming(working(inside)) as consumer:
        await post.send("m-1", b"5")
        await until(lambda: consumer.outcomes == [ConnectionError, ZeroDivisionError, True])
    assert await post.left() == 0
    assert await worked(db) == [("m-1", 5)]


async def test_an_id_that_comes_with_another_payload(db, consuming, post):
    """It is put aside, and the messages behind it are worked."""
    async with consuming(working()) as consumer:
        await post.send("m-1", b"5")
        await until(lambda: consumer.outcomes == [True])
        await post.send("m-1", b"6")
        await post.send("m-2", b"7")
        await until(lambda: len(consumer.outcomes) == 3)
    assert sorted(map(str, consumer.outcomes)) == sorted(map(str, [True, KeyReusedError, True]))
    assert await post.left() == 0
    assert await post.dead() == [("m-1", b"6")]
    assert await worked(db) == [("m-1", 5), ("m-2", 7)]


async def test_a_consumer_killed_before_it_acknowledges(db, start_worker, consuming, post):
    """The message that it has worked comes again, to another one, and is acknowledged without work."""
    await post.send("m-1", b"5")
    worker = start_worker("hold")
    await until(lambda: worker.said() == ["m-1 True"])
    await worker.kill()
    assert await worked(db) == [("m-1", 5)]
    async with consuming(working()) as consumer:
        await until(lambda: consumer.outcomes == [False])
    assert await post.left() == 0
    assert await worked(db) == [("m-1", 5)]
