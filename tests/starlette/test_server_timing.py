"""`Server-Timing`: what the units of a request took, if the middleware is told to say so."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import text
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from sqla_uow import RetryPolicy, UnitOfWorkManager, current_session
from sqla_uow_starlette import UnitOfWorkMiddleware, exception_handlers
from tests.starlette.client import add, app_of, client_of

VALUE = re.compile(
    r'uow(?P<name>[\w%-]*);dur=(?P<all>\d+\.\d), (?:commit[\w%-]*;dur=(?P<commit>\d+\.\d), )?attempts[\w%-]*;desc="(?P<attempts>\d+)"'
)


def timing(response):
    """Return the name, the milliseconds in all and in COMMIT, and the attempts."""
    match = VALUE.fullmatch(response.headers["server-timing"])
    assert match is not None, response.headers["server-timing"]
    commit = None if match["commit"] is None else float(match["commit"])
    return match["name"], float(match["all"]), commit, int(match["attempts"])


@pytest.mark.parametrize("atomic", [False, True])
async def test_units_of_a_request_are_told(db, manager, atomic):
    """One attempt, the time of its COMMIT within the whole; and the row is there."""

    async def endpoint(request):
        await add(2)
        return PlainTextResponse("done")

    async with client_of(app_of(manager, endpoint, atomic=atomic, server_timing=True)) as client:
        response = await client.post("/endpoint")
    name, everything, commit, attempts = timing(response)
    assert (name, attempts) == ("", 1)
    assert 0 <= commit <= everything
    assert await db.scalar("SELECT count(*) FROM account") == 2


async def test_several_units_are_added_up(db, manager):
    """Default mode: the units until the response starts; a reading is none, and a request without any has no header."""

    async def endpoint(request):
        await add(2)
        await add(3)
        return PlainTextResponse("done")

    async def reading(request):
        await current_session().execute(text("SELECT 1"))
        return PlainTextResponse("done")

    async with client_of(app_of(manager, endpoint, reading, server_timing=True)) as client:
        assert timing(await client.post("/endpoint"))[3] == 2
        assert "server-timing" not in (await client.get("/reading")).headers
    assert await db.scalar("SELECT count(*) FROM account") == 3


async def test_off_it_tells_nothing(db, manager):
    """The default."""

    async def endpoint(request):
        await add(2)
        return PlainTextResponse("done")

    async with client_of(app_of(manager, endpoint)) as client:
        response = await client.post("/endpoint")
    assert response.status_code == 200
    assert "server-timing" not in response.headers


async def test_a_replayed_request_tells_its_attempts(db, trouble):
    """A conflict, another run, and the second one's response says so."""
    manager = UnitOfWorkManager(trouble.engine(), retry=RetryPolicy(base=0, cap=0))
    struck = []

    async def endpoint(request):
        await trouble.settle()
        if not struck:
            struck.append(1)
            await trouble.strike(current_session())
        await trouble.write(current_session())
        return PlainTextResponse("done")

    app = app_of(manager, endpoint, atomic=True, retries=2, isolation=trouble.isolation, server_timing=True)
    async with client_of(app) as client:
        response = await client.post("/endpoint")
    assert response.status_code == 200
    assert timing(response)[3] == 2
    assert await db.scalar("SELECT count(*) FROM note") == 1


async def test_a_failure_tells_what_it_took(db, trouble):
    """The answer made of a conflict that outlived its retries has the header too; rolled back, there is no COMMIT."""
    manager = UnitOfWorkManager(trouble.engine(), retry=RetryPolicy(base=0, cap=0))

    async def endpoint(request):
        await trouble.settle()
        await trouble.strike(current_session())
        return PlainTextResponse("done")

    app = app_of(
        manager, endpoint, atomic=True, retries=1, isolation=trouble.isolation, server_timing=True,
        exception_handlers=exception_handlers,
    )  # fmt: skip
    async with client_of(app) as client:
        response = await client.post("/endpoint")
    assert response.status_code == 503
    assert timing(response)[2:] == (None, 2)
    assert await db.scalar("SELECT count(*) FROM note") == 0


async def test_an_error_rolls_back_and_is_told(db, manager):
    """A status from 400: the unit's time, and no COMMIT."""

    async def endpoint(request):
        await add(2)
        raise HTTPException(404)

    async with client_of(app_of(manager, endpoint, atomic=True, server_timing=True)) as client:
        response = await client.post("/endpoint")
    assert response.status_code == 404
    assert timing(response)[2:] == (None, 1)


async def test_a_header_of_the_application_stays(db, manager):
    """Ours is appended, and one more for each further manager, with its name."""
    other = UnitOfWorkManager(db.engine(), name="the archive")

    async def endpoint(request):
        await add(2)
        async with other.begin(read_only=True) as unit:
            await unit.session.execute(text("SELECT 1"))
        return PlainTextResponse("done", headers={"Server-Timing": "cache;dur=1"})

    inside = [Middleware(UnitOfWorkMiddleware, manager=other, server_timing=True)]
    async with client_of(app_of(manager, endpoint, inside=inside, server_timing=True)) as client:
        response = await client.post("/endpoint")
    cache, archive, own = response.headers.get_list("server-timing")
    assert cache == "cache;dur=1"
    assert VALUE.fullmatch(archive)["name"] == "-the%20archive"
    assert VALUE.fullmatch(own)["name"] == ""


@pytest.mark.drivers("sqlite")
async def test_what_is_no_flag_is_refused(db, manager):
    """At construction."""
    with pytest.raises(TypeError) as caught:
        UnitOfWorkMiddleware(None, manager=manager, server_timing="yes")
    assert str(caught.value) == "UnitOfWorkMiddleware has server_timing='yes'; use True or False"
