"""The engine ends with the application."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from sqla_uow import UnitOfWorkManager

    State = Mapping[str, Any] | None
    # Starlette's own type is a union of two, one for each kind of state; only Any is assignable to either.
    Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]

__all__ = ["dispose_on_shutdown"]


def dispose_on_shutdown(
    manager: UnitOfWorkManager[Any], /, *others: UnitOfWorkManager[Any], lifespan: Lifespan | None = None
) -> Lifespan:
    """Return a lifespan that disposes of the managers' engines when the application shuts down.

    ::

        app = Starlette(lifespan=dispose_on_shutdown(manager))

    The database server then sees that its connections are closed, not lost.  Engines are disposed of in reverse order,
    each of them even if another one, or the lifespan inside, fails.

    Args:
        manager: its engine is disposed of.
        others: further managers.
        lifespan: the application's own, which runs inside: its engine still works at its end.
    """

    @asynccontextmanager
    async def disposing(app: Any) -> AsyncGenerator[State]:
        async with AsyncExitStack() as stack:
            for one in (manager, *others):
                stack.push_async_callback(one.engine.dispose)
            yield None if lifespan is None else await stack.enter_async_context(lifespan(app))

    return disposing
