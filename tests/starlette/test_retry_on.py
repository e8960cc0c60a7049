"""`retry_on` of the middleware: what the application alone knows to be worth another attempt of the request."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import IntegrityError
from starlette.responses import PlainTextResponse

from sqla_uow import UnitOfWorkManager, current_session, current_unit
from sqla_uow_starlette import UnitOfWorkMiddleware
from tests.kit.models import Account
from tests.starlette.client import app_of, client_of


def is_taken(error):
    """Say whether a key is taken."""
    return isinstance(error, IntegrityError)


async def open_account(_request):
    """Take the first number that nobody has."""
    number = current_unit().attempt
    current_session().add(Account(id=number, balance=0))
    await current_session().flush()
    return PlainTextResponse(str(number))


@pytest.mark.parametrize(("retry_on", "answer"), [(is_taken, (200, "2")), (None, (500, "Internal Server Error"))])
async def test_a_request_is_run_again(db, retry_on, answer):
    """A key that is taken is no conflict; without `retry_on` it is the request's error."""
    await db.run("INSERT INTO account (id, balance) VALUES (1, 0)")
    app = app_of(UnitOfWorkManager(db.engine()), open_account, atomic=True, retries=3, retry_on=retry_on)
    async with client_of(app) as client:
        response = await client.get("/open_account")
    assert (response.status_code, response.text) == answer
    assert await db.scalar("SELECT count(*) FROM account") == (2 if retry_on else 1)


def test_it_is_checked_where_it_is_written(db):
    """One clear error each, when the application is made."""
    manager = UnitOfWorkManager(db.engine())

    async def waits(_error):
        return True

    with pytest.raises(TypeError, match=r"retry_on of UnitOfWorkMiddleware is given .*, which is async"):
        UnitOfWorkMiddleware(lambda *_: None, manager=manager, atomic=True, retries=1, retry_on=waits)
    with pytest.raises(ValueError, match=r"retry_on=.* without atomic=True"):
        UnitOfWorkMiddleware(lambda *_: None, manager=manager, retry_on=is_taken)
