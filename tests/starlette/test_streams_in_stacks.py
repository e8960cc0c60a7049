"""A streaming response whose generator begins while the request ends: behind a `BaseHTTPMiddleware` it runs in a child task."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Route

from sqla_uow import current_session, transactional
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account
from tests.starlette.client import client_of


class Between(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        """Send on what comes, from another task."""
        return await call_next(request)


@transactional(read_only=True)
async def page(after):
    """Return the keys behind one."""
    wanted = select(Account.id).where(Account.id > after).order_by(Account.id).limit(2)
    return (await current_session().scalars(wanted)).all()


async def stream(request):
    """Read, and then read a page at a time."""
    await current_session().get_one(Account, 1)

    async def lines():
        last = 0
        while keys := await page(last):
            for key in keys:
                yield f"{key}\n"
            last = keys[-1]

    return StreamingResponse(lines())


@pytest.mark.parametrize("stack", [(), (Between,), (Between, Between)], ids=["none", "one", "two"])
async def test_a_unit_for_each_page(db, manager, caplog, stack):
    """The first page begins while the request's reading ends; its connection is not closed under it."""
    await db.run("INSERT INTO account (id, balance) VALUES (2, 0), (3, 0)")
    app = Starlette(
        routes=[Route("/", stream)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager), *map(Middleware, stack)],
    )
    async with client_of(app) as client:
        for _ in range(5):
            assert (await client.get("/")).text == "1\n2\n3\n"
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
