"""Thousands of messages, and consumers that are killed: tox -e consumers.  A run prints the seed of its dice."""

from __future__ import annotations

import asyncio
import collections
import os
import random

import pytest

from tests.consumers.work import working
from tests.kit.brokers import need_clients
from tests.kit.waiting import until

need_clients()

from tests.consumers.clients import CLIENTS  # noqa: E402  # needs the line above

MESSAGES = int(os.environ["SQLA_UOW_CONSUMERS"])
WORKERS = 3
SELDOM, OFTEN = (0.5, 2.5), (0.1, 0.5)  # s between two kills
KILLS = 5  # at least
MINUTES = 10

pytestmark = [pytest.mark.parametrize("client", CLIENTS), pytest.mark.timeout(60 * MINUTES)]


class Workers:
    """Processes that are killed and replaced, at random, until no message waits.

    Args:
        start: starts one.
        how: see `tests.consumers.worker`.
        pause: seconds between two kills, at least and at most.
    """

    def __init__(self, start, how, pause):
        self.kills = 0
        self._all = []
        self._start, self._how, self._pause = start, how, pause
        seed = random.randrange(10**9)
        self._dice = random.Random(seed)
        print(f"\nseed {seed}")  # noqa: T201  # to repeat it

    async def work(self, post):
        """Return when all messages have been delivered, most of them acknowledged, and no process is left."""
        for _ in range(WORKERS):
            self._add()
        await until(self._at_work)
        async with asyncio.timeout(60 * MINUTES):
            while await post.waiting():
                await asyncio.sleep(self._dice.uniform(*self._pause))
                if at_work := self._at_work():  # what is killed while it starts proves little
                    await self._dice.choice(at_work).kill()
                    self.kills += 1
                    self._add()
        for worker in self._all:
            if worker.is_alive:
                await worker.kill()

    def said(self):
        """Return how often they have said what."""
        return collections.Counter(line.split()[-1] for worker in self._all for line in worker.said())

    def _at_work(self):
        return [worker for worker in self._all if worker.is_at_work()]

    def _add(self):
        self._all.append(self._start(self._how))


async def consume_all(messages, workers, post, consuming):
    """Return when all messages are acknowledged."""
    await post.send_many([f"m-{number}" for number in range(1, messages)], b"1")
    await workers.work(post)
    await post.send("m-0", b"1")
    async with consuming(working(retries=20)) as last:

        async def is_empty():  # and there is a consumer, which has at least the last message
            return last.outcomes and not await post.waiting()

        await until(is_empty, seconds=60)
    said = workers.said() + collections.Counter(map(str, last.outcomes))
    print(f"{workers.kills} kills, {dict(said)}")  # noqa: T201  # what is reported
    assert await post.left() == 0
    assert await post.dead() == []
    # The positive control: there were kills, and they left messages that were worked and not acknowledged.
    assert workers.kills >= KILLS
    assert said["lost"] > 0
    assert said["False"] > said["lost"]


async def test_each_message_is_worked_once(db, start_worker, post, consuming):
    """However many consumers were killed, and however often the broker has delivered it."""
    await consume_all(MESSAGES, Workers(start_worker, "together", SELDOM), post, consuming)
    assert await db.rows("SELECT count(*), count(DISTINCT message), sum(amount) FROM worked") == [(MESSAGES,) * 3]


async def test_control_that_claims_apart(db, start_worker, post, consuming):
    """A claim in a transaction of its own loses messages: it was committed, and its work was not."""
    messages = MESSAGES // 10
    await consume_all(messages, Workers(start_worker, "apart", OFTEN), post, consuming)
    assert await db.scalar("SELECT count(DISTINCT message) FROM worked") < messages
