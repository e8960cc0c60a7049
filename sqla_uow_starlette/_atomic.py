"""The request as the transaction: its response is held until COMMIT has answered, and a conflict replays it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqla_uow import Status
from sqla_uow.errors import AfterCommitError, ConflictError, ReadOnlyError, RollbackOnlyError
from sqla_uow_starlette._answer import answering
from sqla_uow_starlette._naming import RequestName
from sqla_uow_starlette._position import Carrier, sent, telling
from sqla_uow_starlette._problems import is_answered
from sqla_uow_starlette._replay import Body, Given
from sqla_uow_starlette._request import answer
from sqla_uow_starlette._sending import ERROR, SERVER_ERROR, Sender, run, unanswered

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from sqla_uow import IsolationLevel, UnitOfWork, UnitOfWorkManager
    from sqla_uow import Scope as UnitScope
    from sqla_uow.events import Observer
    from sqla_uow_starlette._telling import Telling

    Units = AsyncGenerator[UnitOfWork[Any] | None]

__all__ = ["Atomic", "AtomicRequest", "AtomicSender", "is_async"]

logger = logging.getLogger("sqla_uow_starlette")


class Atomic(NamedTuple):
    """What an atomic middleware was told."""

    isolation: IsolationLevel | None
    retries: int
    timeout: float | None
    read_only_methods: frozenset[str]
    should_commit: Callable[[Scope, int], bool] | None
    max_replay_body: int
    retry_on: Callable[[BaseException], bool] | None = None


def is_async(function: object) -> bool:
    """Say whether a function, or an object that can be called, cannot answer by itself."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    kind = cast("type[object]", type(inner))
    call = getattr(kind, "__call__", None)  # noqa: B004  # what an object does when it is called, not whether it can be
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(call)


class AtomicRequest:
    """One request, in as many attempts as it takes.

    Attributes:
        sending: what `send()` of an attempt is.
    """

    sending: type[AtomicSender]

    def __init__(
        self,
        app: ASGIApp,
        manager: UnitOfWorkManager[Any],
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        options: Atomic,
        carrier: Carrier | None,
        observers: tuple[Observer, ...] = (),
        shared: Mapping[str, Any] = MappingProxyType({}),
        tells: Telling | None = None,
    ) -> None:
        self.app = app
        self.manager = manager
        self.options = options
        self.carrier = carrier
        self.observers = observers
        self.tells = tells
        self.scope = scope
        self.send = send
        self.name = RequestName(scope)
        self.given = Given(scope, shared) if options.retries else None
        self.body = Body(receive, options.max_replay_body)
        self.ending = asyncio.Lock()

    async def handle(self) -> None:
        """Handle it in a unit, again after a conflict; answer in the application's place where COMMIT failed."""
        outer = self.scope.get("app")
        known = sent(self.carrier, self.scope)
        try:
            opening = self.manager.scope if self.tells is None else self.tells.opening(self.manager, self.scope)
            async with opening(position=known, observers=self.observers) as unit_scope:
                self.send = telling(self.send, self.carrier, self.scope, unit_scope, known)
                failure = await self.run(unit_scope)
            if failure is not None:
                app = answering(failure, self.scope, outer)
                receive = self.body.replaying(None)
                await answer(app, unit_scope, self.scope, receive, self.send, tells=self.tells)
        finally:
            if self.body.looking is not None:
                await self.body.close()

    async def run(self, unit_scope: UnitScope) -> Exception | None:
        """Run the application until one of its units has ended for good; return what is left to be answered."""
        read_only = self.scope["method"] in self.options.read_only_methods
        units = atomic_requests(self.manager, self.options, self.name, read_only=read_only)
        try:
            await anext(units)
            while True:
                unit = cast("UnitOfWork[Any]", await anext(units))  # None comes between two of them only
                sender = self.sending(self, unit_scope, units, unit)
                await sender.run(self.app, self.body.replaying(unit))
                if not sender.again:
                    return self._explained(sender.failure)
                if await self.body.client_left():
                    logger.info("%s: the client left between two attempts", self.name())
                    return None
                if self.given is not None:
                    self.given.restore()
        finally:
            if not self.ending.locked():  # by a child task that the application has left behind
                await units.aclose()

    def _explained(self, failure: Exception | None) -> Exception | None:
        """Say where it is so that the request was not replayed for the length of its body."""
        if not self.body.overflowed or type(failure) is not ConflictError:
            return failure
        explained = ConflictError(
            f"{self.name()} met a {failure.reason} and was not replayed, because more than "
            f"{self.options.max_replay_body} bytes of its body had been read; raise max_replay_body, or send it again",
            attempts=failure.attempts, elapsed=failure.elapsed, reason=failure.reason, code=failure.code,
        )  # fmt: skip
        explained.__cause__ = failure
        return explained


async def atomic_requests(
    manager: UnitOfWorkManager[Any], options: Atomic, name: RequestName, *, read_only: bool
) -> Units:
    """Yield None, then a unit, for each attempt; the step behind a unit ends it, in whatever task it is taken.

    Its name is what statistics call the requests whose turns it tells of.
    """
    async for attempt in manager.attempts(
        retries=options.retries,
        isolation=options.isolation,
        timeout=options.timeout,
        read_only=read_only,
        retry_on=options.retry_on,
        name=name,
    ):
        yield None  # so that the next unit begins in the task of the request, not where the last one was ended
        async with attempt as unit:
            yield unit  # closed in AtomicRequest.handle()


class Withdrawn(BaseException):
    """Ends a unit in which nothing is to be done; no `Exception`, so that it is never run again for it."""


class AtomicSender(Sender):
    """`send()` of one attempt, which ends the attempt's unit before the response starts.

    Attributes:
        again: whether there is to be another attempt.
        unit: the attempt's.
    """

    def __init__(self, request: AtomicRequest, unit_scope: UnitScope, units: Units, unit: UnitOfWork[Any]) -> None:
        super().__init__(request.scope, unit_scope, request.send, request.body)
        self.again = False
        self._request = request
        self._units = units
        self.unit = unit
        self._ended = False
        self._handled = sys.exception()

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Run the application, and end the unit if no response did."""
        try:
            await run(app, self._request.scope, receive, self)
        except BaseException as error:
            await self._left_by(error)
        else:
            if not self.started:
                async with self._request.ending:
                    if not self._ended:  # nothing was answered
                        await self._roll_back()

    async def _left_by(self, error: BaseException) -> None:
        async with self._request.ending:
            if self._ended:
                raise error
            failure = await self._end(self._units.athrow(error))
        if failure is error:
            raise error
        if failure is not None:
            self.refuse(failure)

    async def before_start(self, status: int) -> None:
        """Commit, or roll back; refuse the response if that is not what it tells of."""
        async with self._request.ending:
            if not self._ended:
                error = unanswered() if status == SERVER_ERROR else None
                await (self.end_for(status) if error is None else self._end_unanswered(error))
            elif self.commits(status) and self.unit.status is not Status.COMMITTED:
                # Cancelled at the first start of a response, inside the application, which has made another one.
                self.refuse(RollbackOnlyError("the request was cancelled while its unit ended; send it again"))
        if not self.refused:
            await self.close(status)

    def unsaved(self, error: ReadOnlyError) -> Exception:
        """Return what tells that the request is committed all the same; before its COMMIT there was no such change."""
        if self.unit.status is not Status.COMMITTED:
            return error
        return AfterCommitError(
            f"{self._request.name()} is committed, but what it read was changed afterwards", [error]
        )

    async def _end_unanswered(self, error: Exception) -> None:
        """Roll back; where we know an answer, refuse the page that has none."""
        failure = await self._end(self._units.athrow(error))
        if failure is not None and is_answered(failure):
            self.refuse(failure)

    async def end_for(self, status: int) -> None:
        """Commit or roll back, as a response of this status does."""
        try:
            commits = self.commits(status)
        except Exception as error:  # of the user's should_commit()
            await self.end_by(error)
            return
        if commits:
            failure = await self._end(anext(self._units))
            if failure is not None:
                self.refuse(failure)
        else:
            await self._roll_back()

    def will_commit(self, status: int) -> bool:
        """Say, where a response of this status begins, whether it will commit as far as that can be told."""
        if self._ended or (status == SERVER_ERROR and unanswered() is not None):
            return False
        try:
            return self.commits(status)
        except Exception:  # of the user's should_commit(); it is asked again where the unit ends
            return False

    def commits(self, status: int) -> bool:
        """Say whether a response of this status commits."""
        should_commit = self._request.options.should_commit
        if should_commit is not None:
            answer: object = should_commit(self._request.scope, status)
            if inspect.isawaitable(answer):
                if inspect.iscoroutine(answer):
                    answer.close()  # nobody will await it
                raise TypeError(
                    f"should_commit returned a {type(answer).__name__}, which would always count as true; "
                    "let it return True or False"
                )
            return bool(answer)
        # A handler sends the response that it made of an exception while that is still being handled.
        return status < ERROR and sys.exception() is self._handled

    async def fail(self, error: BaseException) -> None:
        """Roll back, in the application's place, and refuse a response."""
        async with self._request.ending:
            if not self._ended:
                await self.end_by(error)

    async def withdraw(self) -> None:
        """Roll back, because the application is not to run; nobody has failed."""
        async with self._request.ending:
            if self.unit.status is not Status.DOOMED:
                await self._roll_back()
            else:  # by what is no conflict of the request
                self._ended = True
                with contextlib.suppress(Withdrawn):
                    await self._units.athrow(Withdrawn())
            self.refuse(None)

    async def end_by(self, error: BaseException) -> None:
        """Roll back by an error that is ours; refuse the response."""
        self.refuse(await self._end(self._units.athrow(error)))

    async def _roll_back(self) -> None:
        """Roll back; a response that tells of an error may leave, unless there is another attempt."""
        if self.unit.status is not Status.DOOMED:
            self.unit.doom("the response is not a success")
        # A unit that a conflict has doomed ends by that, also where a handler has made a response of it.
        await self._end(anext(self._units))

    async def _end(self, step: Coroutine[Any, Any, Any]) -> Exception | None:
        """End the unit by a step of its generator; return the error that it ends with, if any."""
        self._ended = True
        try:
            await step
        except StopAsyncIteration:
            return None
        except Exception as error:
            return error
        self.again = True
        self.refuse(None)
        return None


AtomicRequest.sending = AtomicSender
