"""Twelve users with a post each, each with a tag: one more than ten, and one to spare."""

from __future__ import annotations

import inspect

import pytest
from sqlalchemy import insert

from sqla_uow import UnitOfWorkManager
from tests.loads.tables import Base, Post, Tag, User

COUNT = 12


@pytest.fixture
async def blog(db):
    """The tables with their rows, and an engine that is disposed of."""
    engine = db.engine()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(User), [{"id": number, "name": f"u{number}"} for number in range(COUNT)])
        await connection.execute(insert(Post), [{"id": number, "user_id": number} for number in range(COUNT)])
        await connection.execute(insert(Tag), [{"id": number, "post_id": number} for number in range(COUNT)])
    db.blog = engine
    return db


@pytest.fixture
def unit(blog):
    """Begin a unit of a manager with these options."""
    return lambda lazy_loads: UnitOfWorkManager(blog.blog, lazy_loads=lazy_loads).begin()


@pytest.fixture
def here():
    """Find the place in a function whose line ends in such a comment, as file:line."""

    def find(function):
        function = inspect.unwrap(function)
        lines, first = inspect.getsourcelines(function)
        number = next(number for number, line in enumerate(lines) if line.rstrip().endswith("# here"))
        return f"{inspect.getsourcefile(function)}:{first + number}"

    return find
