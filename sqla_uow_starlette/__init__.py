"""Units of work for Starlette and FastAPI.

What this package holds, and will hold, on public names of `sqla_uow` only:

* `UnitOfWorkMiddleware`: pure ASGI; opens a scope for each request and WebSocket connection. With `atomic=True` the
  request is the transaction: its response starts after COMMIT has answered, and a conflict replays the request.
* `exception_handlers`: what a client is told, as RFC 9457 problem details, when a conflict outlives its retries, a
  version is stale or the answer to a COMMIT is lost.
* `etag`, `check_preconditions`: RFC 9110 If-Match and If-None-Match on a version column.
* `dispose_on_shutdown`: ends the engine with the application's lifespan.

Until then, open `manager.scope()` in a middleware or a dependency of your own: `@transactional` functions commit before
they return, so before your endpoint has made its response.
"""

from typing import TYPE_CHECKING, Final

from sqla_uow_starlette._preconditions import AnyVersioned, PreconditionError, check_preconditions, etag
from sqla_uow_starlette._problems import exception_handlers

if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["AnyVersioned", "PreconditionError", "check_preconditions", "etag", "exception_handlers"]

_PLANNED: Final = frozenset(
    {"UnitOfWorkMiddleware", "dispose_on_shutdown"},
)

if not TYPE_CHECKING:  # a module's __getattr__ makes every name exist for a type checker, typing errors included

    def __getattr__(name: str) -> "NoReturn":
        """Explain the absence of a planned name; every other name is missing as usual.

        Args:
            name: The attribute that was not found.

        Raises:
            AttributeError: Always. `from sqla_uow_starlette import NAME` makes an `ImportError` of it.
        """
        if name in _PLANNED:
            msg = f"sqla_uow_starlette.{name} is not written yet; until it is, open manager.scope() in your own middleware"
        else:
            msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg, name=name)
