"""What messages, logs and observers call a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["RequestName"]


class RequestName:
    """The name of one request: ``POST /accounts/{id}`` as soon as it has its route, and for good.

    It is never the path: a path may hold what nobody else should read, and there are too many paths to count by.

    Args:
        scope: in which routing notes what it has found.
    """

    __slots__ = ("_known", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._known: str | None = None

    def __call__(self) -> str:
        """Return what it is called now; ``POST request`` before it has its route, and if it has none."""
        if self._known is None:
            route, method = self._route(), self._scope.get("method", "WEBSOCKET")
            if route is None:
                return f"{method} request"
            self._known = f"{method} {route}"
        return self._known

    def _route(self) -> str | None:
        scope = self._scope
        path = _path(scope)
        if path is not None:
            return self._mounts() + path
        endpoint = scope.get("endpoint")  # all that Starlette before 1.1 tells
        name = getattr(endpoint, "__qualname__", None)
        return None if name is None else f"{name.rpartition('<locals>.')[2]}()"

    def _mounts(self) -> str:
        """Return where the application that has the route is mounted, with the names of parameters for their values."""
        scope = self._scope
        root = scope.get("app_root_path")  # set by the first mount
        mounts: str = "" if root is None else scope["root_path"].removeprefix(root)
        inner = getattr(scope.get("route"), "param_convertors", {})
        for name, value in scope.get("path_params", {}).items():
            if name not in inner:
                mounts = f"{mounts}/".replace(f"/{value}/", f"/{{{name}}}/", 1).removesuffix("/")
        return mounts


def _path(scope: Scope) -> str | None:
    """Return the route's path as it was declared, within the application that has it."""
    # FastAPI keeps the prefix of include_router() in no public place; without it the route is still told.
    look: Any = getattr(scope.get("fastapi"), "get", None)
    found: Any = None if look is None else look("effective_route_context")
    for route in (found, scope.get("route")):
        path = getattr(route, "path", None)
        if isinstance(path, str):
            return path
    return None
