"""Units of work for Starlette and FastAPI, on public names of `sqla_uow` only.

* `UnitOfWorkMiddleware`: pure ASGI; opens a scope for each request and WebSocket connection.  With ``atomic=True`` a request
  is one unit: its response starts after COMMIT has answered, and with ``retries=`` a conflict replays it.
* `exception_handlers`: what a client is told, as RFC 9457 problem details, when a conflict outlives its retries, a
  version is stale or the answer to a COMMIT is lost.
* `etag`, `check_preconditions`: RFC 9110 If-Match and If-None-Match on a version column.
* `Idempotency`: the header Idempotency-Key; a request that is sent again is carried out once.
* `dispose_on_shutdown`: ends the engine with the application's lifespan.

::

    manager = UnitOfWorkManager(create_async_engine("postgresql+asyncpg://..."))
    app = Starlette(
        routes=[...],
        middleware=[Middleware(UnitOfWorkMiddleware, manager=manager)],
        exception_handlers=exception_handlers,
        lifespan=dispose_on_shutdown(manager),
    )
"""

from sqla_uow_starlette._idempotency import Codec, Idempotency, IdempotencyError
from sqla_uow_starlette._lifespan import dispose_on_shutdown
from sqla_uow_starlette._middleware import UnitOfWorkMiddleware
from sqla_uow_starlette._preconditions import AnyVersioned, PreconditionError, check_preconditions, etag
from sqla_uow_starlette._problems import exception_handlers

__all__ = [
    "AnyVersioned",
    "Codec",
    "Idempotency",
    "IdempotencyError",
    "PreconditionError",
    "UnitOfWorkMiddleware",
    "check_preconditions",
    "dispose_on_shutdown",
    "etag",
    "exception_handlers",
]
