"""Options that cannot be are refused where they are written, with what could."""

from __future__ import annotations

import re

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from sqla_uow import (
    RetryPolicy,
    UnitOfWorkManager,
    after_commit,
    after_rollback,
    before_commit,
    current_session,
    current_unit,
    errors,
    transactional,
)

pytestmark = pytest.mark.drivers("sqlite")

WRONG = [
    ({"retries": -1}, ValueError, "has retries=-1; use 0 for a single run"),
    ({"retries": 1.5}, TypeError, "has retries=1.5; use an int, where 5 means up to six runs"),
    ({"retries": True}, TypeError, "has retries=True; use an int, where 5 means up to six runs"),
    ({"retries": "5"}, TypeError, "has retries='5'; use an int, where 5 means up to six runs"),
    ({"timeout": 0}, ValueError, "has timeout=0; use seconds above 0, or None for no deadline"),
    ({"timeout": -1.0}, ValueError, "has timeout=-1.0; use seconds above 0, or None for no deadline"),
    ({"timeout": float("inf")}, ValueError, "has timeout=inf; use seconds above 0, or None for no deadline"),
    ({"timeout": float("nan")}, ValueError, "has timeout=nan; use seconds above 0, or None for no deadline"),
    ({"timeout": "1"}, TypeError, "has timeout='1'; use seconds, or None for no deadline"),
    ({"timeout": True}, TypeError, "has timeout=True; use seconds, or None for no deadline"),
    ({"retry": 5}, TypeError, "has retry=5; pass a RetryPolicy, and the number as retries="),
    (
        {"isolation": "serializable"}, ValueError,
        ("asks for isolation 'serializable', which is not an SQL level; use one of READ UNCOMMITTED, READ COMMITTED, "
        "REPEATABLE READ, SERIALIZABLE"),
    ),
    ({"isolation": 3}, ValueError, ("asks for isolation 3, which is not an SQL level; use one of READ UNCOMMITTED, "
     "READ COMMITTED, REPEATABLE READ, SERIALIZABLE")),
]  # fmt: skip
OF_A_CALL = [
    ({"propagation": "new"}, ValueError, ("has propagation='new', which is unknown; use one of 'required', 'requires_new', "
     "'nested', 'mandatory', 'durable'")),
    ({"read_only": 1}, TypeError, "has read_only=1; use True or False"),
]  # fmt: skip


async def work():
    """Be decorated."""


@pytest.fixture
def engine(tmp_path):
    """Provide an engine that never connects."""
    return create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/never.db")


@pytest.mark.parametrize(("options", "error", "message"), [
    *WRONG, *OF_A_CALL,
    ({"retry_on": "IntegrityError"}, TypeError,
     "has retry_on='IntegrityError'; pass a function of the exception that returns a bool"),
])  # fmt: skip
def test_at_decoration(options, error, message):
    """R7, R8: of the function; nothing has to be called."""
    with pytest.raises(error, match=f"^{re.escape('work() ' + message)}$"):
        transactional(**options)(work)


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_of_a_manager(engine, options, error, message):
    """At construction, naming the manager."""
    with pytest.raises(error, match=f"^{re.escape(f'UnitOfWorkManager {chr(39)}orders{chr(39)} ' + message)}$"):
        UnitOfWorkManager(engine, name="orders", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"), [case for case in (*WRONG, *OF_A_CALL) if not {"retry", "retries"} & set(case[0])]
)
def test_of_begin(engine, options, error, message):
    """At the call, before the block is entered."""
    with pytest.raises(error, match=f"^{re.escape('begin() ' + message)}$"):
        UnitOfWorkManager(engine).begin(**options)


@pytest.mark.parametrize(("options", "error", "message"), [case for case in WRONG if not {"retry"} & set(case[0])])
def test_of_attempts(engine, options, error, message):
    """At the call, before the loop begins."""
    with pytest.raises(error, match=f"^{re.escape('attempts() ' + message)}$"):
        UnitOfWorkManager(engine).attempts(**{"retries": 1, **options})


@pytest.mark.parametrize("using", ["", None, 5, UnitOfWorkManager])
def test_using_that_names_no_manager(using):
    """A name, or the manager itself."""
    message = f"transactional(using=...) got {using!r}; use a string that is not empty"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        transactional(using=using)


@pytest.mark.parametrize("name", ["", None, 5])
def test_a_manager_needs_a_name(engine, name):
    """A string that is not empty."""
    message = f"UnitOfWorkManager(name=...) got {name!r}; use a string that is not empty"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        UnitOfWorkManager(engine, name=name)


def test_ambiguous_commit_has_two_words(engine):
    """'raise' and 'verify'."""
    with pytest.raises(ValueError, match=r"ambiguous_commit='retry', which is unknown; use 'raise' or 'verify'$"):
        UnitOfWorkManager(engine, ambiguous_commit="retry")


def test_what_a_manager_cannot_be_bound_to(engine, tmp_path):
    """S8: a URL, a sync engine, makers without a bind, with `binds=`, with sessions that take no options."""

    class Stubborn(AsyncSession):
        def __init__(self, bind):
            super().__init__(bind)

    refused = {
        "sqlite+aiosqlite://": "got str; pass an AsyncEngine of create_async_engine()",
        engine.sync_engine: "got Engine; pass an AsyncEngine",
        async_sessionmaker(): "has no bind; bind it to an AsyncEngine",
        async_sessionmaker(binds={AsyncSession: engine}): "has binds=, but a unit is one transaction on one engine",
        async_sessionmaker(
            engine, class_=Stubborn
        ): "Stubborn cannot be made with expire_on_commit, close_resets_only and",
    }
    for bind, message in refused.items():
        with pytest.raises(TypeError, match=re.escape(message)):
            UnitOfWorkManager(bind)


def test_an_engine_in_autocommit_is_refused(engine):
    """Nothing could be rolled back."""
    with pytest.raises(
        ValueError, match="the engine is in AUTOCOMMIT, where nothing can be rolled back; pass one without"
    ):
        UnitOfWorkManager(engine.execution_options(isolation_level="AUTOCOMMIT"))


@pytest.mark.parametrize("name", ["clock", "sleep", "rng"])
def test_a_policy_of_what_cannot_be_called(name):
    """Else it would be found out at the first conflict."""
    with pytest.raises(TypeError, match=rf"^RetryPolicy\({name}=1\) cannot be called; pass a function$"):
        RetryPolicy(**{name: 1})


@pytest.mark.parametrize("ask", [current_session, current_unit])
def test_what_is_asked_for_what_is_no_manager(engine, ask):
    """It is not said to have no unit."""
    message = rf"^{ask.__name__}\(\) got AsyncEngine; pass the name of a manager, or the manager itself$"
    with pytest.raises(TypeError, match=message):
        ask(engine)
    with pytest.raises(errors.NoManagerError, match=rf"^{ask.__name__}\(\) found no manager 'default'; "):
        ask()


def test_a_manager_of_which_no_unit_is_open(engine):
    """Named by itself it need not be activated, but it has to have begun one."""
    message = r"^no unit of work of this manager is open here; call this inside 'async with manager.begin\(\)'$"
    with pytest.raises(errors.NoUnitError, match=message):
        current_session(UnitOfWorkManager(engine))


@pytest.mark.parametrize("register", [after_commit, before_commit, after_rollback])
async def test_a_hook_that_cannot_be_called(engine, register):
    """Refused where it is registered; behind COMMIT it would be too late."""
    message = (
        "a hook is of type NoneType, which cannot be called; pass the function, and its arguments after it: "
        "after_commit(send, address)"
    )
    with UnitOfWorkManager(engine).activate() as manager:
        async with manager.begin():
            with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
                register(None)


def test_a_policy_is_frozen_and_keyword_only():
    """It may be shared by all functions of a program."""
    with pytest.raises(TypeError, match="positional"):
        RetryPolicy(0.1)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        RetryPolicy().base = 5
