"""A request that has an Idempotency-Key: it is carried out once, and answered alike whenever it is sent again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import TYPE_CHECKING, Any

from sqla_uow import Status
from sqla_uow.errors import KeyReusedError
from sqla_uow.idempotency import Claim, Key, Record
from sqla_uow_starlette._atomic import AtomicRequest, AtomicSender
from sqla_uow_starlette._idempotency import IDEMPOTENT, IdempotencyError, decoded, encoded, key_of, running

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sqla_uow import Scope as UnitScope
    from sqla_uow import UnitOfWork, UnitOfWorkManager
    from sqla_uow_starlette._atomic import Units
    from sqla_uow_starlette._idempotency import Idempotency

__all__ = ["KeyedRequest"]

logger = logging.getLogger("sqla_uow_starlette")

_LOOK_SECONDS = 0.05


class Fingerprint:
    """Hashes what a request is, and its body while somebody reads it.

    Args:
        receive: where the body comes from.
    """

    def __init__(self, receive: Receive) -> None:
        self._hash: Any = hashlib.sha256()
        self._receive = receive
        self._left = False
        self._complete = False

    def begin(self, options: Idempotency, scope: Scope) -> None:
        """Take note of what the request is; before its body is read."""
        parts: Iterable[bytes]
        if options.fingerprint is None:
            path = scope["path"].encode("utf-8", "surrogatepass")
            parts = scope["method"].encode(), path, scope.get("query_string", b"")
        else:
            chosen = options.fingerprint(scope)
            if chosen is None:
                self._hash = None
                return
            parts = (chosen,)
        for part in parts:
            self._hash.update(len(part).to_bytes(8, "big") + part)

    async def receive(self) -> Message:
        """Return the next message, having taken note of it."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._left = True
        elif not self._complete:
            if self._hash is not None:
                self._hash.update(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        return message

    async def digest(self, receive: Receive) -> bytes | None:
        """Read what the application has not read; return the fingerprint, None where there is none.

        Args:
            receive: through which the application reads.
        """
        if self._hash is None:
            return None
        while not (self._complete or self._left):
            await receive()
        digest: bytes = self._hash.digest()
        return digest if self._complete else None


class KeyedSender(AtomicSender):
    """Holds a response that is to be kept until it is complete, and stores it before COMMIT."""

    def __init__(self, request: KeyedRequest, unit_scope: UnitScope, units: Units, unit: UnitOfWork[Any]) -> None:
        super().__init__(request, unit_scope, units, unit)
        self.keyed = request
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._decision: bool | None = None

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Run the application if the attempt gets the key."""
        request = self.keyed
        request.found = Claim.OURS
        try:
            request.found = await request.idempotency.keys.take(self.unit, request.key, keep=request.idempotency.keep)
        except BaseException as error:
            await self.fail(error)
            return
        if request.found is Claim.OURS:
            await super().run(app, receive)
        else:
            await self.withdraw()

    async def __call__(self, message: Message) -> None:
        """Hold a message, or pass it on.

        Raises:
            Refused: the response must not leave.
        """
        kind = message["type"]
        if self.refused or self.started:
            await super().__call__(message)
        elif kind == "http.response.start" and self._start is None:
            if self.will_commit(message["status"]):
                self._start = message
                if _length(message) > self.keyed.idempotency.max_response:
                    await self._too_large()
            else:
                await super().__call__(message)
        elif self._start is None or not kind.startswith("http.response.") or kind == "http.response.debug":
            await super().__call__(message)
        elif kind == "http.response.body":
            await self._hold(self._start, message)
        else:  # a file that the server is to send, or trailers
            await self._too_large()

    async def _hold(self, start: Message, message: Message) -> None:
        more = message.get("more_body", False)
        is_stream = more and not self._parts and _length(start) < 0
        self._parts.append(message.get("body", b""))
        self._size += len(self._parts[-1])
        if is_stream or self._size > self.keyed.idempotency.max_response:
            await self._too_large()
        if more:
            return
        body = b"".join(self._parts)
        await super().__call__(start)
        await super().__call__({"type": "http.response.body", "body": body, "more_body": False})

    def commits(self, status: int) -> bool:
        """Say whether a response of this status commits; asked once, where the response begins."""
        if self._decision is None:
            self._decision = super().commits(status)
        return self._decision

    async def end_for(self, status: int) -> None:
        """Store the response with the work, and commit."""
        kept = None
        if self._start is not None and self.unit.status is not Status.DOOMED:  # else nothing of it is kept
            try:
                kept = await self._store(self._start)
            except Exception as error:
                await self.end_by(error)
                return
        await super().end_for(status)
        if self.unit.status is Status.COMMITTED:  # also if a hook has failed
            self.keyed.settle(kept)

    async def _store(self, start: Message) -> Record:
        request = self.keyed
        digest = await request.fingerprint.digest(request.body.replaying(self.unit))
        options = request.idempotency
        kept = encoded(options, start["status"], start.get("headers", ()), b"".join(self._parts), digest)
        await options.keys.store(self.unit, request.key, kept)
        return kept

    async def _too_large(self) -> None:
        request = self.keyed
        error = IdempotencyError(
            500, "the response to this request cannot be kept, so it was rolled back; it will be so again",
            code="idempotency-response-too-large",
        )  # fmt: skip
        logger.error(
            "%s has an idempotency key, and a response that is streamed or has more than %d bytes; raise max_response, or "
            "answer with a link to it",
            request.name(), request.idempotency.max_response,
        )  # fmt: skip
        await self.fail(error)
        await super().__call__({"type": "http.response.body"})  # which unwinds the application


class KeyedRequest(AtomicRequest):
    """An atomic request that has a key.

    Attributes:
        found: what the last attempt to claim the key was answered.
    """

    sending = KeyedSender

    def __init__(
        self,
        app: ASGIApp,
        manager: UnitOfWorkManager[Any],
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        idempotency: Idempotency,
        **options: Any,
    ) -> None:
        scope[IDEMPOTENT] = True
        self.fingerprint = Fingerprint(receive)
        super().__init__(app, manager, scope, self.fingerprint.receive, send, **options)
        self.idempotency = idempotency
        self.key: Key
        self.found: Record | Claim = Claim.OURS
        self._mine: Future[Record | None] | None = None

    async def run(self, unit_scope: UnitScope) -> Exception | None:
        """Carry it out, or answer it by the response that there is; return what is left to be answered."""
        try:
            self.key = key_of(self.idempotency, self.scope)
            self.fingerprint.begin(self.idempotency, self.scope)
        except Exception as error:  # of the client, or of the user's functions
            return error
        loop, others = asyncio.get_running_loop(), running(self.idempotency)
        until = loop.time() + self.idempotency.wait
        while (other := others.get((self.manager, self.key.digest))) is not None:
            await asyncio.wait({other}, timeout=max(0.0, until - loop.time()))
            if not other.done():
                return _in_progress()
            if (kept := other.result()) is not None:
                return await self._replay(kept, unit_scope)
        self._mine = others[self.manager, self.key.digest] = loop.create_future()
        try:
            failure = await self._carry_out(unit_scope, until)
        finally:
            self.settle(self.found if isinstance(self.found, Record) else None)
        return await self._replay(self.found, unit_scope) if isinstance(self.found, Record) else failure

    async def _carry_out(self, unit_scope: UnitScope, until: float) -> Exception | None:
        """Run it as soon as no other transaction has the key."""
        while True:
            failure = await super().run(unit_scope)
            if self.found is not Claim.TAKEN:
                return failure
            self.found = await self._look(until)
            if self.found is not Claim.OURS:
                return _in_progress() if self.found is Claim.TAKEN else None

    async def _look(self, until: float) -> Record | Claim:
        """Wait for another process, without a connection but for the moments in which it looks."""
        clock = asyncio.get_running_loop().time
        while (left := until - clock()) > 0:
            await asyncio.sleep(min(left, _LOOK_SECONDS))
            try:
                found = await self.idempotency.keys.look(self.manager, self.key)
            except Exception:  # of a database that is away: a unit will tell
                return Claim.OURS
            if found is not Claim.TAKEN:
                return found
        return Claim.TAKEN

    def settle(self, kept: Record | None) -> None:
        """Tell those who wait in this process what came of it."""
        mine, self._mine = self._mine, None
        if mine is not None:
            del running(self.idempotency)[self.manager, self.key.digest]
            mine.set_result(kept)

    async def _replay(self, kept: Record, unit_scope: UnitScope) -> Exception | None:
        if kept.fingerprint is not None:
            try:
                digest = await self.fingerprint.digest(self.body.replaying(None))
                self.idempotency.keys.check(self.key, kept, digest)
            except KeyReusedError as error:
                return error
        if unit_scope.last_write is not None:  # the client may never have got the position of that COMMIT
            unit_scope.last_write.lose()
        for message in decoded(self.idempotency, kept):
            await self.send(message)
        return None


def _in_progress() -> IdempotencyError:
    return IdempotencyError(
        409, "a request with this Idempotency-Key is being carried out; send it again later",
        code="idempotency-key-in-progress", headers={"Retry-After": "1"},
    )  # fmt: skip


def _length(start: Message) -> int:
    """Return the length that a response announces, -1 where it announces none."""
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return -1
