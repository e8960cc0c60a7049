"""Versioned pages, and an application that shows and changes them under preconditions."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sqla_uow import UnitOfWorkManager, current_session, transactional
from sqla_uow.mixins import Versioned
from sqla_uow_starlette import check_preconditions, etag, exception_handlers


class Base(DeclarativeBase):
    pass


class Page(Versioned, Base):
    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(default=0)


class Draft(Versioned, Base):
    """Another type with the same keys."""

    __tablename__ = "draft"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


@contextlib.asynccontextmanager
async def pages(db, **options):
    """Provide a manager, activated, over a fresh table with page 1; nothing stays checked out."""
    engine = db.engine(**options)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await db.run("INSERT INTO page (id, value, version) VALUES (1, 0, 1)")
    manager = UnitOfWorkManager(engine)
    with manager.activate():
        yield manager
    if hasattr(engine.pool, "checkedout"):
        assert engine.pool.checkedout() == 0


class Meeting:
    """Lets nobody go on before everybody is there."""

    def __init__(self, parties):
        self._barrier = asyncio.Barrier(parties)
        self.met = False

    async def wait(self):
        async with asyncio.timeout(20):
            await self._barrier.wait()
        self.met = True


async def nothing():
    """Be called where an application waits for nobody."""


def app(*, arrived=nothing, read=nothing, required=True, middleware=(), **options):
    """Make the application.

    Args:
        arrived: awaited by each PUT before its unit.
        read: awaited by each PUT that passed its preconditions, before it writes.
        required: of the PUT's preconditions.
        middleware: of the application.
        options: of its `@transactional`.
    """

    @transactional(read_only=True)
    async def show(request):
        page = await current_session().get(Page, request.path_params["id"])
        check_preconditions(request, page)
        return Response(status_code=404) if page is None else answer(page)

    @transactional(**options)
    async def put(request, value):
        page = await current_session().get(Page, request.path_params["id"])
        check_preconditions(request, page, required=required)
        await read()
        if page is None:
            page = Page(id=request.path_params["id"])
            current_session().add(page)
        page.value = value
        await current_session().flush()
        return page

    async def change(request):
        value = (await request.json())["value"]
        await arrived()
        return answer(await put(request, value))

    routes = [Route("/pages/{id:int}", show), Route("/pages/{id:int}", change, methods=["PUT"])]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=exception_handlers)


def answer(page):
    """Return what a client sees of a page."""
    return JSONResponse({"value": page.value}, headers={"ETag": etag(page)})


def client(app, **options):
    """Return a client of an application, in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, **options), base_url="http://test")
