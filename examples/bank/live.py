"""The WebSocket that shows the ledger as it grows.

The first message is what there is, each later one what has changed; each is read in a unit of its own.  Between two
messages nothing is held: no transaction, no connection to the database.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from starlette.websockets import WebSocketDisconnect

from examples.bank import services
from examples.bank.feed import FEED
from examples.bank.shapes import account_json, entry_json

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

    from examples.bank.feed import Listener

__all__ = ["feed"]

SHOWN = 100
"""How many accounts the first message has."""
_PAUSE = 0.1  # s; ten messages a second are as many as an eye can follow


async def feed(websocket: WebSocket) -> None:
    """Tell one client of every commit, until it leaves or the server stops."""
    await websocket.accept()
    with FEED.listening() as listener:  # before the first message is read, so that nothing falls between
        leaving = asyncio.create_task(_until_it_leaves(websocket, listener))
        try:
            await _tell(websocket, listener)
        finally:
            leaving.cancel()


async def _tell(websocket: WebSocket, listener: Listener) -> None:
    with contextlib.suppress(WebSocketDisconnect):  # it left while we sent
        first = await services.accounts(after=0, most=SHOWN)
        await websocket.send_json({"accounts": [account_json(account) for account in first], "entries": []})
        while await listener.wait():
            news = await services.news(*listener.take())
            accounts, entries = map(account_json, news.accounts), map(entry_json, news.entries)
            await websocket.send_json({"accounts": list(accounts), "entries": list(entries)})
            await asyncio.sleep(_PAUSE)


async def _until_it_leaves(websocket: WebSocket, listener: Listener) -> None:
    """Read and ignore what the client says."""
    try:
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass
    finally:
        listener.close()
