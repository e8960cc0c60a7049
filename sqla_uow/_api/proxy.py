"""`session_proxy`: the current session under one name, for what is made before there is a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._api.current import current_session
from sqla_uow._api.manager import UnitOfWorkManager

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["session_proxy"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


@overload
def session_proxy(using: UnitOfWorkManager[S], /) -> S: ...


@overload
def session_proxy(using: str = "default", /) -> AsyncSession: ...


def session_proxy(using: str | UnitOfWorkManager[Any] = "default", /) -> Any:
    """Return what stands for the current session, whichever that is when it is used.

    For objects that get a session when they are made and are used in many units: repositories, services in a container.  An
    attribute of it is that of `current_session`, which raises what it would raise there.

    Args:
        using: the name of a manager, or the manager itself, which need not be activated.

    Raises:
        TypeError: `using` is neither a name nor a manager.
    """
    if not isinstance(using, str | UnitOfWorkManager):
        raise TypeError(
            f"session_proxy() got {type(using).__name__}; pass the name of a manager, or the manager itself"
        )
    return _SessionProxy(using)


class _SessionProxy:
    """Leaves everything to the current session."""

    __slots__ = ("_using",)

    def __init__(self, using: str | UnitOfWorkManager[Any]) -> None:
        object.__setattr__(self, "_using", using)

    def __getattr__(self, name: str) -> Any:
        return getattr(current_session(self._using), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(current_session(self._using), name, value)

    def __contains__(self, instance: object) -> bool:
        return instance in current_session(self._using)

    def __iter__(self) -> Iterator[object]:
        return iter(current_session(self._using))

    # For isinstance() of containers and validators; the class of the manager's sessions is known only while one is open.
    __class__ = property(lambda _: AsyncSession)  # pyright: ignore[reportIncompatibleMethodOverride]  # read only, as nobody sets it

    def __repr__(self) -> str:
        using = self._using if isinstance(self._using, str) else self._using.name
        return f"<session_proxy of the manager {using!r}>"
