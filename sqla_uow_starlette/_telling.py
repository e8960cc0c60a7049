"""What the transactions of a request are told first, found in its ASGI scope."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from starlette.types import Scope

    from sqla_uow import Scope as UnitScope
    from sqla_uow import UnitOfWorkManager
    from sqla_uow.typing import Settings

__all__ = ["Telling"]


class Telling(NamedTuple):
    """What a middleware was told of settings and roles."""

    settings: Callable[[Scope], Settings] | None
    role: str | Callable[[Scope], str | None] | None

    @classmethod
    def of(
        cls,
        manager: UnitOfWorkManager[Any],
        settings: Callable[[Scope], Settings] | None,
        role: str | Callable[[Scope], str | None] | None,
    ) -> Telling | None:
        """Check it; return None if there is nothing."""
        if settings is None and role is None:
            return None
        if settings is not None and not callable(settings):
            raise TypeError(
                f"UnitOfWorkMiddleware has settings of type {type(settings).__name__}; pass a function of the ASGI scope, as "
                "lambda scope: {'app.tenant': ...}"
            )
        telling = cls(settings, role)
        telling.opening(manager, {})()  # checks what can be known before a request
        return telling

    def opening(
        self, manager: UnitOfWorkManager[Any], scope: Scope
    ) -> Callable[..., AbstractAsyncContextManager[UnitScope]]:
        """Return `UnitOfWorkManager.scope` for a request: whenever a unit is opened in it, its ASGI scope is asked."""
        settings, role = self.settings, self.role
        return partial(
            manager.scope,
            settings=None if settings is None else partial(settings, scope),
            role=partial(role, scope) if callable(role) else role,
        )
