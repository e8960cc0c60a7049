"""Codes that are permanent by themselves, and not if a certain function of PostgreSQL's raised them."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from sqla_uow._classify import Kind, classify

FUNCTIONS = {
    "RevalidateCachedQuery": "0A000",
    "getTypeInputInfo": "XX000",
    "getTypeBinaryInputInfo": "XX000",
    "getTypeOutputInfo": "XX000",
    "getTypeBinaryOutputInfo": "XX000",
}


@pytest.mark.parametrize(("function", "code"), FUNCTIONS.items())
def test_what_was_prepared_before_a_migration(function, code):
    """A plan, or a type, that is no more: the next attempt prepares anew."""
    assert kind_of(code, function) is Kind.STALE_PLAN


@pytest.mark.parametrize("code", ["0A000", "XX000"])
def test_the_same_code_of_another_function(code):
    """What the server cannot do, or has found broken in itself, it will not do the next time either."""
    assert kind_of(code, "somewhere_else") is Kind.PERMANENT
    assert kind_of(code, None) is Kind.PERMANENT


def kind_of(code, function):
    """Return what SQLAlchemy's error around asyncpg's means."""
    asyncpg = pytest.importorskip("asyncpg.exceptions")
    theirs = asyncpg.PostgresError.new({"C": code, "M": "message"} | ({"R": function} if function else {}))
    return classify(DBAPIError("SELECT 1", {}, theirs)).kind
