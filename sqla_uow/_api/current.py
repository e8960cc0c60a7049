"""The current unit, its session, and the functions that register hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, ParamSpec, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._api.manager import UnitOfWorkManager, setup_of
from sqla_uow._scope.lookup import innermost, locate
from sqla_uow._scope.places import refuse_in_commit
from sqla_uow._transaction.hooks import Hook, being_run
from sqla_uow.errors import NoUnitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqla_uow._scope.places import ManagerPlace
    from sqla_uow._unit.unit import UnitOfWork

__all__ = [
    "after_commit",
    "after_rollback",
    "before_commit",
    "current_session",
    "current_unit",
]

P = ParamSpec("P")
S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


@overload
def current_unit(using: UnitOfWorkManager[S], /) -> UnitOfWork[S]: ...


@overload
def current_unit(using: str = "default", /) -> UnitOfWork[Any]: ...


def current_unit(using: str | UnitOfWorkManager[Any] = "default", /) -> UnitOfWork[Any]:
    """Return the unit of work of this context.

    In a scope, outside any transactional function, it is the scope's read-only unit.

    Args:
        using: the name of a manager, or the manager itself.

    Raises:
        NoUnitError: no unit is open, or the one that was open here has ended.
        NoManagerError: no manager of that name is activated.
        TaskBoundaryError: another live task uses the unit, or this is a worker thread.
        TypeError: `using` is neither a name nor a manager.
    """
    place = innermost(using)
    if place is None:
        place = _place_of(using, "current_unit()")
    return place.unit()


@overload
def current_session(using: UnitOfWorkManager[S], /) -> S: ...


@overload
def current_session(using: str = "default", /) -> AsyncSession: ...


def current_session(using: str | UnitOfWorkManager[Any] = "default", /) -> AsyncSession:
    """Return the session of this context's unit of work; see `current_unit`.

    Args:
        using: the name of a manager, or the manager itself; then the session has the class that the manager was given.

    Raises:
        NoUnitError: no unit is open, or the one that was open here has ended.
        NoManagerError: no manager of that name is activated.
        TaskBoundaryError: another live task uses the unit, or this is a worker thread.
        TypeError: `using` is neither a name nor a manager.
    """
    place = innermost(using)
    if place is None:
        place = _place_of(using, "current_session()")
    session: AsyncSession = place.unit().session
    return session


def _place_of(using: object, who: str) -> ManagerPlace:
    """Return the innermost place of a manager that was passed itself.

    Raises:
        NoManagerError, NoUnitError, TypeError: it has no place here.
    """
    if isinstance(using, str):
        locate(using, who)
    if not isinstance(using, UnitOfWorkManager):
        raise TypeError(f"{who} got {type(using).__name__}; pass the name of a manager, or the manager itself")
    manager: UnitOfWorkManager[Any] = cast("Any", using)  # isinstance() cannot tell the class of its sessions
    place = innermost(setup_of(manager))
    if place is not None:
        return place
    refuse_in_commit()
    raise NoUnitError("no unit of work of this manager is open here; call this inside 'async with manager.begin()'")


def after_commit(hook: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `hook` once after the current unit has committed; see `UnitOfWork.after_commit`.

    If an `after_commit` hook calls it outside any unit, it adds to the hooks that are being run.  It registers with the
    manager named "default"; for another one use ``current_unit("name").after_commit(...)``.

    Args:
        hook: a sync or async function; its result is ignored.
        args: passed to the hook.
        kwargs: passed to the hook.

    Raises:
        NoUnitError: no unit is open here.
        TypeError: `hook` cannot be called.
    """
    _register("after_commit", hook, args, kwargs)


def before_commit(hook: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `hook` inside the transaction at the end of the current unit; see `UnitOfWork.before_commit`.

    Args:
        hook: a sync or async function; its result is ignored.
        args: passed to the hook.
        kwargs: passed to the hook.

    Raises:
        NoUnitError: no unit is open here.
        TypeError: `hook` cannot be called.
    """
    current_unit().before_commit(hook, *args, **kwargs)


def after_rollback(hook: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None:
    """Call `hook` after a rollback of the current unit or savepoint; see `UnitOfWork.after_rollback`.

    If an `after_rollback` hook calls it outside any unit, it adds to the hooks that are being run.

    Args:
        hook: a sync or async function; its result is ignored.
        args: passed to the hook.
        kwargs: passed to the hook.

    Raises:
        NoUnitError: no unit is open here.
        TypeError: `hook` cannot be called.
    """
    _register("after_rollback", hook, args, kwargs)


def _register(
    kind: Literal["after_commit", "after_rollback"],
    hook: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Add a hook to the unit that is open here, or, outside any, to those of its kind that are being run."""
    running = being_run(kind)
    unit: UnitOfWork[Any] | None = None
    try:
        unit = current_unit()
    except NoUnitError:
        if running is None:
            raise
    if running is not None and (unit is None or unit._transaction.scope_read):
        running.append(Hook.of(hook, args, kwargs))
    elif unit is not None:
        getattr(unit, kind)(hook, *args, **kwargs)
