"""What the page on consumers tells to write works, with real brokers."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select

from tests.docs.test_docs import CHECKOUT, blocks, run
from tests.kit.brokers import need_clients
from tests.kit.waiting import until

need_clients()

from tests.consumers.post import POSTS  # noqa: E402  # needs the line above

PAGE = CHECKOUT / "docs/how-to/consumers.md"
URLS = {"nats": "nats://localhost:4222", "rabbitmq": "amqp://guest:guest@localhost:5672"}
STARTS = {
    "nats-plain": "consume_from_nats(URL)",
    "nats-faststream": "nats_broker.start()",
    "rabbitmq-plain": "consume_from_rabbitmq(URL)",
    "rabbitmq-faststream": "rabbitmq_broker.start()",
}
STOPS = {"nats-faststream": "nats_broker.stop()", "rabbitmq-faststream": "rabbitmq_broker.stop()"}


@pytest.fixture
async def page(client, broker, queue, tmp_path, monkeypatch):
    """What the blocks of the page have defined; they speak to the broker of the tests, about a queue of this test's own."""
    monkeypatch.chdir(tmp_path)
    url = broker.url()
    namespace = {"__name__": "page", "URL": url}
    kind = client.partition("-")[0]
    for block in blocks(PAGE):
        await run(block._replace(code=block.code.replace(URLS[kind], url).replace("deposits", queue)), namespace)
    await namespace["try_it"]()
    yield namespace
    await namespace["engine"].dispose()


def failing_at_first(work, bad):
    """Return the work, which fails once at a message."""
    failures = [ConnectionError]

    async def work_or_fail(message, payload):
        if message == bad and failures:
            raise failures.pop()
        return await work(message, payload)

    return work_or_fail


@pytest.mark.drivers("sqlite")
@pytest.mark.parametrize("client", STARTS)
async def test_the_consumer_of_the_page(driver, client, broker, queue, page):
    """It works each message once, comes back after a failure, and puts aside what never goes well."""
    kind = client.partition("-")[0]
    options = {"arguments": page["QUEUE"]} if kind == "rabbitmq" else {}

    async def balance():
        async with page["manager"].begin(read_only=True) as unit:
            return await unit.session.scalar(select(page["Account"].balance))

    assert await balance() == 5  # of the first block
    page["deposit"] = failing_at_first(page["deposit"], "m-3")
    async with POSTS[kind](broker.url(), queue, **options) as post:
        consuming = asyncio.ensure_future(eval(STARTS[client], page))  # noqa: S307  # our own page
        await post.send("m-2", b"7")
        await post.send("m-2", b"7")
        await post.send("m-1", b"6")
        await post.send("m-3", b"20")
        letters = []

        async def is_done():
            letters.extend(await post.dead())
            return letters and await balance() == 32 and not await post.waiting()

        await until(is_done)
        await post.send("m-4", b"1")

        async def is_behind():
            return await balance() == 33

        await until(is_behind)
        if client in STOPS:
            await eval(STOPS[client], page)  # noqa: S307  # likewise
        else:
            consuming.cancel()
        await asyncio.wait([consuming])
        assert await post.left() <= 1  # the last one may have been stopped before it was acknowledged
    assert set(letters) == {("m-1", b"6")}
    assert await balance() == 33
