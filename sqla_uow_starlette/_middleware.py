"""`UnitOfWorkMiddleware`: what each request and WebSocket connection runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from sqla_uow import UnitOfWorkManager
from sqla_uow_starlette._atomic import Atomic, AtomicRequest, is_async
from sqla_uow_starlette._idempotency import Idempotency, applies
from sqla_uow_starlette._keyed import KeyedRequest
from sqla_uow_starlette._position import Carrier, PositionIn, sent
from sqla_uow_starlette._request import handle_connection, handle_request
from sqla_uow_starlette._telling import Telling
from sqla_uow_starlette._timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from sqla_uow import IsolationLevel
    from sqla_uow.typing import Settings

__all__ = ["UnitOfWorkMiddleware"]

_MIB = 1024 * 1024


class UnitOfWorkMiddleware:
    """Pure ASGI middleware: opens a scope for each request and WebSocket connection.

    In the scope, outside any transactional function, `current_session()` is a read session.  The scope ends before the
    response starts, so that a streaming body or a background task gets `NoUnitError`.  `@transactional` functions
    commit before they return, so before there is a response.

    With ``atomic=True`` a request is one unit, which `@transactional` functions join.  The start of its response is held
    until COMMIT has answered; if COMMIT fails, the application's own exception handlers answer instead.  The unit is
    rolled back if the response has status 400 or above, or if an exception was raised, even one that a handler answers.

    Args:
        app: the application.
        manager: it opens the scopes and begins the units.  For several managers add the middleware several times.
        atomic: make each request a unit.
        isolation: the level of these units; None is the manager's.
        retries: how often a request is run again after a conflict, before any byte of a response has left; 0 is one run.
        retry_on: a function that is called with an exception that has left the endpoint and is not known to be retryable,
            and returns True to run the request again; see `sqla_uow.transactional`.
        timeout: seconds that all attempts and waits of one request may take together; None is the manager's.
        read_only_methods: the methods, say ``("GET", "HEAD")``, whose units are read-only.
        should_commit: a function of the ASGI scope and the response's status, which decides instead of the rule above.
            A unit that is doomed is rolled back all the same.
        position_in: with replicas, where a client keeps how far it has written, so that its next requests read nothing
            older.  ``"cookie"`` is a cookie; ``"header"`` is the header ``Uow-Position``, which the client has to send
            back; None keeps nothing.
        max_replay_body: bytes of a request's body that are kept for another attempt; if more was read, there is no
            other attempt.
        server_timing: tell in the header `Server-Timing` how long the units of a request took until its response
            started, how long COMMIT took, and how many attempts there were.  Everybody who may read the response can
            read it.
        idempotency: carry out a request once, however often it is sent with the same Idempotency-Key.
        settings: a function of the ASGI scope that returns the settings of a request's transactions, over those of the
            manager; see `sqla_uow.UnitOfWorkManager`.  It is called whenever a unit is opened in the request, so that it
            knows what other middleware has put into the scope by then.
        role: a function of the ASGI scope that returns the role of a request's transactions, or a role.

    Raises:
        TypeError, ValueError: an argument cannot work; the message says what would work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        manager: UnitOfWorkManager[Any],
        atomic: bool = False,
        isolation: IsolationLevel | None = None,
        retries: int = 0,
        retry_on: Callable[[BaseException], bool] | None = None,
        timeout: float | None = None,
        read_only_methods: Iterable[str] = (),
        should_commit: Callable[[Scope, int], bool] | None = None,
        max_replay_body: int = _MIB,
        position_in: Literal["cookie", "header"] | None = "cookie",
        server_timing: bool = False,
        idempotency: Idempotency | None = None,
        settings: Callable[[Scope], Settings] | None = None,
        role: str | Callable[[Scope], str | None] | None = None,
    ) -> None:
        _check_types(
            manager,
            atomic,
            read_only_methods,
            should_commit,
            max_replay_body=max_replay_body,
            server_timing=server_timing,
            idempotency=idempotency,
        )
        methods = frozenset(method.upper() for method in read_only_methods)
        if not atomic:
            _refuse_unused(
                isolation=isolation, retries=retries or None, retry_on=retry_on, timeout=timeout,
                read_only_methods=tuple(sorted(methods)) or None, should_commit=should_commit, idempotency=idempotency,
            )  # fmt: skip
        elif idempotency is not None and (both := sorted(methods & idempotency.methods)):
            raise ValueError(
                f"UnitOfWorkMiddleware has {', '.join(both)} in read_only_methods, and idempotency for it, which writes; "
                "leave it out of one of them"
            )
        manager.attempts(
            retries=retries, isolation=isolation, timeout=timeout, retry_on=retry_on, name="UnitOfWorkMiddleware"
        )  # checks them
        self.app = app
        self.manager = manager
        self._server_timing = server_timing
        self._idempotency = idempotency
        self._shared: Mapping[str, Any] = {}
        if position_in not in (None, *get_args(PositionIn)):
            raise ValueError(
                f"UnitOfWorkMiddleware has position_in={position_in!r}, which is unknown; use 'cookie', 'header' or None"
            )
        self._carrier = Carrier(manager, position_in) if position_in is not None and manager.replicas else None
        self._tells = Telling.of(manager, settings, role)
        self._atomic = (
            Atomic(isolation, retries, timeout, methods, should_commit, max_replay_body, retry_on) if atomic else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; what is neither a request nor a WebSocket passes through."""
        carrier = self._carrier
        if scope["type"] == "websocket":
            opening = self.manager.scope if self._tells is None else self._tells.opening(self.manager, scope)
            await handle_connection(self.app, opening(position=sent(carrier, scope)), scope, receive, send)
            return
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                self._shared = scope.get("state", self._shared)  # filled when the lifespan begins
            await self.app(scope, receive, send)
            return
        observers: tuple[Timing, ...] = ()
        if self._server_timing:
            timing = Timing(self.manager.name)
            send, observers = timing.telling(send), (timing,)
        if self._atomic is None:
            await handle_request(
                self.app,
                self.manager,
                scope,
                receive,
                send,
                carrier=carrier,
                observers=observers,
                tells=self._tells,
            )
        elif self._idempotency is not None and applies(self._idempotency, scope):
            await KeyedRequest(
                self.app, self.manager, scope, receive, send, idempotency=self._idempotency,
                options=self._atomic, carrier=carrier, observers=observers, shared=self._shared, tells=self._tells,
            ).handle()  # fmt: skip
        else:
            await AtomicRequest(
                self.app, self.manager, scope, receive, send,
                options=self._atomic, carrier=carrier, observers=observers, shared=self._shared, tells=self._tells,
            ).handle()  # fmt: skip


def _check_types(
    manager: object,
    atomic: object,
    read_only_methods: object,
    should_commit: object,
    *,
    max_replay_body: object,
    server_timing: object,
    idempotency: object,
) -> None:
    """Tell those without a type checker what it would have told them; the rest is checked where it is used."""
    who = "UnitOfWorkMiddleware"
    if not isinstance(manager, UnitOfWorkManager):
        raise TypeError(f"{who} has manager={manager!r}; pass the UnitOfWorkManager that its requests are to use")
    if not isinstance(atomic, bool):
        raise TypeError(f"{who} has atomic={atomic!r}; use True or False")
    if not isinstance(server_timing, bool):
        raise TypeError(f"{who} has server_timing={server_timing!r}; use True or False")
    if idempotency is not None and not isinstance(idempotency, Idempotency):
        raise TypeError(f"{who} has idempotency={idempotency!r}; pass an Idempotency, or None")
    if isinstance(read_only_methods, str):
        raise TypeError(f"{who} has read_only_methods={read_only_methods!r}; pass several, as ('GET', 'HEAD')")
    if should_commit is not None and not callable(should_commit):
        raise TypeError(f"{who} has should_commit={should_commit!r}; pass a function of the scope and the status")
    if is_async(should_commit):
        raise TypeError(
            f"{who} has a should_commit that is async: its answer would always count as true; "
            "pass a plain function, and let the endpoint note in the scope's state what it has to know"
        )
    if isinstance(max_replay_body, bool) or not isinstance(max_replay_body, int):
        raise TypeError(f"{who} has max_replay_body={max_replay_body!r}; use a number of bytes")
    if max_replay_body < 0:
        raise ValueError(f"{who} has max_replay_body={max_replay_body!r}; use a number of bytes, 0 or more")


def _refuse_unused(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"UnitOfWorkMiddleware has {name}={value!r} without atomic=True, where it means nothing; "
                "add atomic=True, or say it at the @transactional functions"
            )
