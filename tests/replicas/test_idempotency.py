"""A client that was told by a repetition only that its work is done reads it, too."""

from __future__ import annotations

import pytest
from sqlalchemy import MetaData, text
from starlette.responses import JSONResponse

from sqla_uow import current_session
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow_starlette import Idempotency
from tests.kit.waiting import until
from tests.replicas.conftest import at_replica, write
from tests.starlette.client import app_of, client_of

pytestmark = pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")


async def put(request):
    """Write a row."""
    await write(1)
    return JSONResponse(None)


async def get(request):
    """Say how many rows there are, and whether a replica said so."""
    return JSONResponse([await current_session().scalar(text("SELECT count(*) FROM note")), await at_replica()])


async def test_a_client_reads_what_a_repetition_told_it_of(pair):
    """It never got the position of its COMMIT: the replica that has not replayed it is not asked; later it is again."""
    metadata = MetaData()
    keys = IdempotencyKeys(metadata)
    engine = pair.engine(pair.primary)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    await pair.caught_up()
    idempotency = Idempotency(keys, caller=lambda _scope: "ann")
    options = {"atomic": True, "read_only_methods": ["GET"], "idempotency": idempotency}
    app = app_of(pair.manager(replica_wait=0.1), put, get, **options)
    headers = {"Idempotency-Key": "one"}
    pair.replica.pause()
    async with client_of(app, raise_app_exceptions=True) as lost, client_of(app, raise_app_exceptions=True) as client:
        await lost.post("/put", headers=headers)  # whose answer does not arrive
        assert (await client.post("/put", headers=headers)).headers["idempotent-replayed"] == "true"
        assert (await client.get("/get")).json() == [1, False]
        pair.replica.resume()

        async def read_at_the_replica():
            return (await client.get("/get")).json() == [1, True]

        await until(read_at_the_replica)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
