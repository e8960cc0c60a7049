"""Every stale write is told over HTTP as one, also those that come out of no flush: 409, and 412 with If-Match."""

from __future__ import annotations

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.mixins import Versioned
from sqla_uow_starlette import UnitOfWorkMiddleware, check_preconditions, exception_handlers


class Base(DeclarativeBase):
    pass


class Page(Versioned, Base):
    """A page that two people edit."""

    __tablename__ = "stale_page"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[int] = mapped_column(default=0)


@transactional
async def merged(request):
    """Write the client's whole object, with the version it has seen."""
    await current_session().merge(Page(id=1, version=1, text=7))
    return JSONResponse({})


@transactional
async def listed(request):
    """Write by a list of primary keys, with the version it has seen."""
    await current_session().execute(update(Page), [{"id": 1, "version": 1, "text": 7}])
    return JSONResponse({})


@transactional
async def matched(request):
    """Write what the client's If-Match allows."""
    page = await current_session().get_one(Page, 1)
    check_preconditions(request, page)
    page.text = 7
    return JSONResponse({})


@pytest.fixture
async def client(db):
    """A client of an application whose page is at version 2."""
    manager = UnitOfWorkManager(db.engine())
    async with manager.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with manager.begin() as unit:
        unit.session.add(Page(id=1, text=1))
    async with manager.begin() as unit:
        (await unit.session.get_one(Page, 1)).text = 2
    app = Starlette(
        routes=[Route(f"/{one.__name__}", one, methods=["PUT"]) for one in (merged, listed, matched)],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager)],
        exception_handlers=exception_handlers,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pages") as client:
        yield client
    async with manager.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


@pytest.mark.parametrize("path", ["/merged", "/listed"])
async def test_a_stale_object_is_a_conflict(db, client, path):
    """409, and the row is as the other one has left it."""
    answer = await client.put(path)
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert await db.rows("SELECT text, version FROM stale_page") == [(2, 2)]


async def test_a_stale_tag_fails_its_precondition(db, client):
    """412, and the row is as the other one has left it."""
    answer = await client.put("/matched", headers={"If-Match": '"seen-long-ago"'})
    assert (answer.status_code, answer.headers["content-type"]) == (412, "application/problem+json")
    assert await db.rows("SELECT text, version FROM stale_page") == [(2, 2)]
