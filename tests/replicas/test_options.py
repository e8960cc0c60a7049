"""What can be passed as a replica."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager
from sqla_uow.__main__ import main
from sqla_uow_starlette import UnitOfWorkMiddleware


def test_what_is_refused():
    """Each with a reason and a remedy."""
    sqlite = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(
        ValueError,
        match=r"^UnitOfWorkManager 'default' has replicas over aiosqlite, which cannot report a replication position; "
        r"use asyncpg, psycopg, asyncmy, aiomysql$",
    ):
        UnitOfWorkManager(sqlite, replicas=[sqlite])
    with pytest.raises(
        TypeError,
        match=r"^UnitOfWorkManager 'default' has a replica of type str; pass engines of create_async_engine\(\)$",
    ):
        UnitOfWorkManager(sqlite, replicas=["sqlite://"])
    with pytest.raises(
        TypeError, match=r"^UnitOfWorkManager 'default' has replicas of type AsyncEngine; pass a list of engines$"
    ):
        UnitOfWorkManager(sqlite, replicas=sqlite)
    for wait in (-1, float("inf"), "1", True):
        with pytest.raises(ValueError, match=r"has replica_wait=.*; use a number of seconds, 0 or more$"):
            UnitOfWorkManager(sqlite, replica_wait=wait)
    with pytest.raises(
        ValueError,
        match=r"^UnitOfWorkMiddleware has position_in='body', which is unknown; use 'cookie', 'header' or None$",
    ):
        UnitOfWorkMiddleware(None, manager=UnitOfWorkManager(sqlite), position_in="body")


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_a_replica_of_another_database(db):
    """Its positions would mean nothing."""
    other = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(
        ValueError,
        match=rf"^UnitOfWorkManager 'default' is on {db.family}, and a replica of it on sqlite; pass its own replicas$",
    ):
        UnitOfWorkManager(db.engine(), replicas=[other])


def test_without_replicas_there_is_no_position():
    """A scope keeps none, and takes none."""
    manager = UnitOfWorkManager(create_async_engine("sqlite+aiosqlite://"))
    assert manager.replicas == ()
    assert manager.scope(position="0-1") is not None


@pytest.mark.drivers("asyncpg", "psycopg", "asyncmy", "aiomysql")
async def test_the_doctor_knows_them(pair, capsys):
    """A replica is in step, and as a database of its own it is called what it is."""
    primary, replica = (server.url(pair.driver) for server in (pair.primary, pair.replica))
    await asyncio.to_thread(main, ["doctor", primary, "--replica", replica, "--read-only", "--json"])
    found = {one["name"]: one["value"] for one in json.loads(capsys.readouterr().out)}
    assert (found["replica 1"], found["role"].startswith("primary")) == ("in step", True)
    await asyncio.to_thread(main, ["doctor", replica, "--read-only", "--json"])
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["role"]["level"] == "note"
    assert found["role"]["value"].startswith(("standby, ", "replica"))
