"""Versions over HTTP: what If-Match and If-None-Match let through, and what a race does."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.starlette.pages import Meeting, app, client, pages

WRITERS = 20
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


async def race(application, headers, number=WRITERS):
    """Send PUTs at the same time; return how many had which status."""
    async with client(application) as http:
        puts = [http.put("/pages/1", json={"value": value + 1}, headers=headers) for value in range(number)]
        return Counter(answer.status_code for answer in await asyncio.gather(*puts))


async def tag_of(application):
    """Return the ETag of page 1, as a client gets it."""
    async with client(application) as http:
        return (await http.get("/pages/1")).headers["ETag"]


@pytest.mark.drivers("asyncpg", "asyncmy")
@pytest.mark.parametrize("isolation", LEVELS)
async def test_one_of_many_writers_wins(db, isolation):
    """W7: all have compared the tag before anybody writes; the UPDATE's WHERE lets one of them through."""
    async with pages(db, pool_size=WRITERS):
        read = Meeting(WRITERS)
        writing = app(read=read.wait, isolation=isolation, retries=5)
        assert await race(writing, {"If-Match": await tag_of(writing)}) == {200: 1, 412: WRITERS - 1}
        assert read.met
    assert await db.scalar("SELECT version FROM page") == 2


@pytest.mark.drivers("sqlite")
async def test_one_of_many_writers_wins_on_sqlite(db):
    """W7: all are there before one writes; each unit is alone from its BEGIN on."""
    async with pages(db):
        arrived = Meeting(WRITERS)
        writing = app(arrived=arrived.wait, retries=5)
        assert await race(writing, {"If-Match": await tag_of(writing)}) == {200: 1, 412: WRITERS - 1}
        assert arrived.met
    assert await db.scalar("SELECT version FROM page") == 2
