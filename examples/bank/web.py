"""The endpoints: HTTP on one side, the functions of `services` on the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from examples.bank import mail, services
from examples.bank.branches import AtBranch, branch
from examples.bank.fields import AFTER, AMOUNT, CREDIT, LIMIT, NAME, NUMBER, ON_DUTY, REFERENCE, body, number, query
from examples.bank.live import feed
from examples.bank.models import KEYS
from examples.bank.openapi import DOCUMENT
from examples.bank.problems import HANDLERS, ProblemError
from examples.bank.shapes import account_json, clerk_json, entry_json, statement_line
from sqla_uow_starlette import (
    Idempotency,
    UnitOfWorkMiddleware,
    check_preconditions,
    dispose_on_shutdown,
    etag,
    exception_handlers,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import Scope

    from examples.bank.models import Account
    from sqla_uow import UnitOfWorkManager

__all__ = ["create_app", "routes"]

_PAGE = Path(__file__).parent / "page"
_AT_ONCE = 200  # entries of a statement that are read in one unit


async def page(_request: Request) -> Response:
    """Show the page."""
    return FileResponse(_PAGE / "index.html")


async def openapi(_request: Request) -> Response:
    """Describe the endpoints."""
    return JSONResponse(DOCUMENT)


class Accounts(HTTPEndpoint):
    """All accounts."""

    async def get(self, request: Request) -> Response:
        """Return the accounts that come after a number."""
        found = await services.accounts(after=query(request, "after", AFTER), most=query(request, "limit", LIMIT))
        return JSONResponse([account_json(account) for account in found])

    async def post(self, request: Request) -> Response:
        """Open an account."""
        wish = await body(request, {"owner": NAME, "credit": CREDIT})
        opened = await services.open_account(**wish)
        return _shown(opened, 201, {"location": f"/accounts/{opened.id}"})


class OneAccount(HTTPEndpoint):
    """One account, and the version that a client has seen of it."""

    async def get(self, request: Request) -> Response:
        """Return an account with its version, or 304 if the client has that version."""
        account = await services.account(number(request))  # outside any transactional function: the read session
        check_preconditions(request, account)
        return _shown(account)

    async def put(self, request: Request) -> Response:
        """Change an account, if nobody has changed it since the client saw it."""
        wish = await body(request, {"owner": NAME, "credit": CREDIT})

        def check(account: Account) -> None:
            check_preconditions(request, account, required=True)

        changed = await services.edit(number(request), **wish, check=check)
        if changed is None:
            raise ProblemError(409, "the account is overdrawn by more than this credit")
        return _shown(changed)


def _shown(account: Account, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(account_json(account), status, headers={"etag": etag(account), **(headers or {})})


async def statement(request: Request) -> Response:
    """Stream all entries of an account, one JSON object a line."""
    account = await services.account(number(request))
    return StreamingResponse(_lines(account.id), media_type="application/x-ndjson")


async def _lines(account: int) -> AsyncIterator[str]:
    """Read the entries bit by bit, each in a unit of its own.

    The request's scope ends where its response starts.  So a client that reads slowly holds no connection.
    """
    last = 0
    while entries := await services.entries(account, last, _AT_ONCE):
        for entry in entries:
            yield json.dumps(statement_line(entry, account)) + "\n"
        last = entries[-1].id


async def deposit(request: Request) -> Response:
    """Put money into an account."""
    wish = await body(request, {"amount": AMOUNT, "reference": REFERENCE})
    booked = await services.deposit(number(request), **wish)
    return JSONResponse(entry_json(booked), 201)


async def transfer(request: Request) -> Response:
    """Move money, and write to the payee after the response."""
    wish = await body(request, {"source": NUMBER, "target": NUMBER, "amount": AMOUNT, "reference": REFERENCE})
    if wish["source"] == wish["target"]:
        raise ProblemError(422, "source and target are the same account")
    booked = await services.transfer(**wish)
    if booked is None:
        raise ProblemError(409, f"account {wish['source']} has too little for that")
    # The task runs after COMMIT, and not for a repetition.  It gets a number, not the row: the unit is closed by then.
    return JSONResponse(entry_json(booked), 201, background=BackgroundTask(mail.notify, booked.id))


async def get_clerks(_request: Request) -> Response:
    """Return the clerks."""
    return JSONResponse([clerk_json(clerk) for clerk in await services.clerks()])


async def put_clerk(request: Request) -> Response:
    """Let a clerk come or leave."""
    wish = await body(request, {"on_duty": ON_DUTY})
    clerk = await services.set_duty(number(request), **wish)
    if clerk is None:
        raise ProblemError(409, "nobody would be left on duty")
    return JSONResponse(clerk_json(clerk))


async def letters(_request: Request) -> Response:
    """Return the latest letters to payees."""
    return JSONResponse([letter for written_at, letter in mail.SENT if written_at == branch.get()])


def _sender(_scope: Scope) -> str:
    """Say who sends a key.  Nobody logs in here, so a whole branch; return the id of a user where somebody does."""
    return branch.get()


def _is_an_answer(_scope: Scope, status: int) -> bool:
    """Say what is committed: a refusal too, for it is true only if the transaction commits, and it is remembered."""
    return status in (201, 409)


def _transfers(manager: UnitOfWorkManager) -> Route:
    """Make each request for a transfer a transaction, so that the record of its key is in it."""
    once = Middleware(
        UnitOfWorkMiddleware,
        manager=manager,
        atomic=True,
        isolation="SERIALIZABLE",
        retries=services.RETRIES,
        should_commit=_is_an_answer,
        idempotency=Idempotency(KEYS, caller=_sender),
    )
    return Route("/transfers", transfer, methods=["POST"], middleware=[once])


def routes(manager: UnitOfWorkManager) -> list[BaseRoute]:
    """Return the endpoints."""
    return [
        Route("/", page),
        Mount("/page", StaticFiles(directory=_PAGE)),
        Route("/openapi.json", openapi),
        Route("/accounts", Accounts),
        Route("/accounts/{number}", OneAccount),
        Route("/accounts/{number}/statement", statement),
        Route("/accounts/{number}/deposits", deposit, methods=["POST"]),
        _transfers(manager),
        Route("/clerks", get_clerks),
        Route("/clerks/{number}", put_clerk, methods=["PUT"]),
        Route("/letters", letters),
        WebSocketRoute("/feed", feed),
    ]


def create_app(manager: UnitOfWorkManager) -> Starlette:
    """Make the service over a database that has the tables."""
    return Starlette(
        routes=routes(manager),
        middleware=[Middleware(AtBranch), Middleware(UnitOfWorkMiddleware, manager=manager)],
        exception_handlers={**exception_handlers, **HANDLERS},
        lifespan=dispose_on_shutdown(manager),
    )
