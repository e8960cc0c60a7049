"""The same endpoints without the library: what SQLAlchemy's tutorial shows, at the isolation the database happens to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import DateTime, event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.bank import models
from examples.bank.fields import AMOUNT, CREDIT, NAME, NUMBER, ON_DUTY, REFERENCE, body, number
from examples.bank.problems import HANDLERS, ProblemError
from examples.bank.shapes import account_json, clerk_json, entry_json

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["create_plain_app"]


class HeadOffice(Session):
    """The session: this bank has one branch."""


@event.listens_for(HeadOffice, "after_begin")
def _tell_branch(_session: object, _transaction: object, connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT set_config('bank.branch', 'main', true)")


class Base(DeclarativeBase):
    """The metadata of these models; the tables are those of `models`."""


class Account(Base):
    """An account; its version is a column like any other, and nobody counts it."""

    __tablename__ = models.Account.__tablename__
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    credit: Mapped[int]
    balance: Mapped[int]
    version: Mapped[int]


class Entry(Base):
    """A line of the ledger."""

    __tablename__ = models.Entry.__tablename__
    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[int | None]
    target: Mapped[int]
    amount: Mapped[int]
    reference: Mapped[str]
    at = mapped_column(DateTime(timezone=True), default=models.now)


def _sessions(request: Request) -> async_sessionmaker[AsyncSession]:
    sessions: async_sessionmaker[AsyncSession] = request.app.state.sessions
    return sessions


async def get_account(request: Request) -> Response:
    """Return an account."""
    async with _sessions(request)() as session:
        return JSONResponse(account_json(await session.get_one(Account, number(request))))


async def put_account(request: Request) -> Response:
    """Change an account."""
    wish = await body(request, {"owner": NAME, "credit": CREDIT})
    async with _sessions(request).begin() as session:
        account = await session.get_one(Account, number(request))
        account.owner, account.credit = wish["owner"], wish["credit"]
    return JSONResponse(account_json(account))


async def deposit(request: Request) -> Response:
    """Put money into an account."""
    wish = await body(request, {"amount": AMOUNT, "reference": REFERENCE})
    async with _sessions(request).begin() as session:
        payee = await session.get_one(Account, number(request))
        payee.balance += wish["amount"]
        session.add(entry := Entry(target=payee.id, **wish))
    return JSONResponse(entry_json(entry), 201)


async def transfer(request: Request) -> Response:
    """Move money."""
    wish = await body(request, {"source": NUMBER, "target": NUMBER, "amount": AMOUNT, "reference": REFERENCE})
    async with _sessions(request).begin() as session:
        payer = await session.get_one(Account, wish["source"])
        payee = await session.get_one(Account, wish["target"])
        if payer.balance + payer.credit < wish["amount"]:
            raise ProblemError(409, "too little money")
        payer.balance -= wish["amount"]
        payee.balance += wish["amount"]
        session.add(entry := Entry(**wish))
    return JSONResponse(entry_json(entry), 201)


async def put_clerk(request: Request) -> Response:
    """Let a clerk come or leave."""
    wish = await body(request, {"on_duty": ON_DUTY})
    async with _sessions(request).begin() as session:
        clerk = await session.get_one(models.Clerk, number(request))
        there = await session.scalar(select(func.count()).where(models.Clerk.on_duty)) or 0
        if not wish["on_duty"] and clerk.on_duty and there == 1:
            raise ProblemError(409, "nobody would be left on duty")
        if wish["on_duty"] and not there:
            clerk.found_nobody += 1
        clerk.on_duty = wish["on_duty"]
    return JSONResponse(clerk_json(clerk))


def create_plain_app(engine: AsyncEngine) -> Starlette:
    """Make the service."""
    routes = [
        Route("/accounts/{number}", get_account, methods=["GET"]),
        Route("/accounts/{number}", put_account, methods=["PUT"]),
        Route("/accounts/{number}/deposits", deposit, methods=["POST"]),
        Route("/transfers", transfer, methods=["POST"]),
        Route("/clerks/{number}", put_clerk, methods=["PUT"]),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.state.sessions = async_sessionmaker(engine, expire_on_commit=False, sync_session_class=HeadOffice)
    return app
