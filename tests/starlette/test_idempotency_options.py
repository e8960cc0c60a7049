"""What `Idempotency` and the middleware refuse, when they are made."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow_starlette import Idempotency, UnitOfWorkMiddleware
from tests.starlette.keyed import caller


async def of_nobody(_scope):
    """Be a function that cannot be asked."""
    return "nobody"


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"keys": MetaData()}, TypeError, "got MetaData"),
        ({"caller": None}, TypeError, "has caller=None"),
        ({"caller": of_nobody}, TypeError, "has caller=<function of_nobody"),
        ({"fingerprint": 5}, TypeError, "has fingerprint=5"),
        ({"methods": "POST"}, TypeError, "has methods='POST'; pass several"),
        ({"headers": "etag"}, TypeError, "has headers='etag'; pass several"),
        ({"headers": ["ETag", "Set-Cookie"]}, ValueError, "has headers with set-cookie"),
        ({"headers": ["Uow-Position-second"]}, ValueError, "has headers with uow-position-second"),
        ({"required": "yes"}, TypeError, "has required='yes'"),
        ({"keep": 5}, ValueError, "has keep=5"),
        ({"keep": timedelta(0)}, ValueError, "has keep="),
        ({"wait": -1}, ValueError, "has wait=-1"),
        ({"wait": float("inf")}, ValueError, "has wait=inf"),
        ({"max_response": 0}, ValueError, "has max_response=0"),
        ({"max_response": 2**24}, ValueError, "has max_response=16777216"),
    ],
)
def test_options_that_cannot_work(options, error, what):
    """Each is refused with what would work."""
    given = {"keys": IdempotencyKeys(MetaData()), "caller": caller, **options}
    with pytest.raises(error, match=f"^Idempotency {what}"):
        Idempotency(given.pop("keys"), **given)


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"atomic": False}, ValueError, "has idempotency=.* without atomic=True"),
        ({"read_only_methods": ("GET", "POST")}, ValueError, "has POST in read_only_methods, and idempotency for it"),
        ({"idempotency": "yes"}, TypeError, "has idempotency='yes'"),
    ],
)
def test_a_middleware_that_cannot_work(options, error, what):
    """Likewise."""
    manager = UnitOfWorkManager(create_async_engine("sqlite+aiosqlite://"))
    given = {"atomic": True, "idempotency": Idempotency(IdempotencyKeys(MetaData()), caller=caller), **options}
    with pytest.raises(error, match=f"^UnitOfWorkMiddleware {what}"):
        UnitOfWorkMiddleware(of_nobody, manager=manager, **given)


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        ({"metadata": 5}, TypeError, "got int; pass the MetaData"),
        ({"keep": 5}, TypeError, "has keep=5"),
        ({"keep": timedelta(-1)}, ValueError, "has keep="),
    ],
)
def test_keys_that_cannot_work(given, error, what):
    """Likewise."""
    given = {"metadata": MetaData(), **given}
    with pytest.raises(error, match=f"^IdempotencyKeys {what}"):
        IdempotencyKeys(given.pop("metadata"), **given)
