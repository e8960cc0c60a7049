"""The branches of the bank, on PostgreSQL: who serves at one sees nothing of the others.

Policies in the database see to it, whatever an endpoint asks for; see the migration 0004.  They read a setting that each
transaction is told first.  Which branch it is, is known in a ``ContextVar``: so it holds for what follows a response as
well, a letter or a statement that is still being read.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["HEAD_OFFICE", "AtBranch", "branch", "settings_for"]

HEAD_OFFICE = "main"
SETTING = "bank.branch"
branch: ContextVar[str] = ContextVar("branch", default=HEAD_OFFICE)


def settings_for(engine: AsyncEngine) -> dict[str, Any]:
    """Return what a manager of the bank is to tell its transactions: elsewhere there are no policies, and one branch."""
    return {"settings": {SETTING: branch.get}} if engine.dialect.name == "postgresql" else {}


class AtBranch:
    """Middleware that knows at which branch a request is made: where people log in, by who they are; here, by a header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request or a connection at its branch."""
        named = next((value for name, value in scope.get("headers", ()) if name == b"x-branch"), b"").decode("latin-1")
        token = branch.set(named or HEAD_OFFICE)
        try:
            await self.app(scope, receive, send)
        finally:
            branch.reset(token)
