"""`transactional`: the same name for ``@transactional`` and ``@transactional(...)``."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

from sqla_uow._api.manager import UnitOfWorkManager, setup_of
from sqla_uow._attempts.arguments import NOTHING, find_used, keep, leaves_all
from sqla_uow._attempts.attempt import Attempt
from sqla_uow._attempts.call import Call, before_first_attempt
from sqla_uow._scope.lookup import locate
from sqla_uow._settings.sources import layer_of
from sqla_uow._unit.join import join, joinable
from sqla_uow._unit.options import Options, check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from sqla_uow._retry.policy import RetryPolicy
    from sqla_uow._unit.setup import Setup
    from sqla_uow.typing import IsolationLevel, Propagation

__all__ = ["transactional"]

P = ParamSpec("P")
R = TypeVar("R")


class Transactional(Protocol):
    """What ``transactional(...)`` returns: a decorator that keeps the signature."""

    def __call__(self, func: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...


@overload
def transactional(func: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R]]: ...
@overload
def transactional(
    *,
    using: str | UnitOfWorkManager[Any] = ...,
    retries: int | None = ...,
    isolation: IsolationLevel | None = ...,
    read_only: bool = ...,
    propagation: Propagation = ...,
    timeout: float | None = ...,
    retry: RetryPolicy | None = ...,
    retry_on: Callable[[BaseException], bool] | None = ...,
    settings: Mapping[str, str | None] | None = ...,
    role: str | None = ...,
) -> Transactional: ...
def transactional(
    func: Callable[..., Any] | None = None,
    /,
    *,
    using: str | UnitOfWorkManager[Any] = "default",
    retries: int | None = None,
    isolation: IsolationLevel | None = None,
    read_only: bool = False,
    propagation: Propagation = "required",
    timeout: float | None = None,
    retry: RetryPolicy | None = None,
    retry_on: Callable[[BaseException], bool] | None = None,
    settings: Mapping[str, str | None] | None = None,
    role: str | None = None,
) -> Any:
    """Run an ``async def`` function in a unit of work.

    The outermost transactional function owns the unit: it begins it, commits it, and runs the function again, with the
    same arguments in a new session and transaction, when the database reports a conflict.  So the function must be safe
    to run again: put what is not in the transaction (mails, files, caches) into `after_commit`.

    Args:
        func: the function, if it is decorated without options.
        using: the name of an activated manager, or the manager itself.
        retries: how often the function may be run *again*: 5 means up to six runs.  None is the manager's number.
        isolation: the level its unit must have; None is the manager's.
        read_only: refuse writes, in the database as well.
        propagation: what to do when a unit is open already. ``"required"`` joins it; ``"nested"`` makes a savepoint in it;
            ``"requires_new"`` begins another beside it, on a connection of its own; ``"mandatory"`` joins, and refuses to
            begin; ``"durable"`` begins, and refuses to join.
        timeout: seconds for all attempts and waits together; None is the manager's.
        retry: how long to wait between attempts; None is the manager's.
        retry_on: a function that is called with an exception that is not known to be retryable, and returns True to
            retry.  Use it where your code knows better, such as an allocator of keys that tries another key after a
            unique violation.  If the function joins a unit, the owner of the unit retries.
        settings: values of settings, over those of the manager; constants only, and None for a value that is not there.  A
            unit that the function joins must have the same.
        role: the role that its unit takes on; likewise.

    Raises:
        TypeError: the function is not ``async def``, an option has the wrong type, or `retry_on` is async; raised at
            decoration.
        ValueError: an option has a value that cannot work; raised at decoration, or at the call if it depends on the
            database.

    Besides what the function itself raises, a call may raise: `ConflictError`, `TransactionTimeoutError`,
    `AmbiguousCommitError`, `RollbackOnlyError`, `AfterCommitError`, `PropagationError`, `TaskBoundaryError`,
    `NoManagerError`.
    """
    if isinstance(using, UnitOfWorkManager):
        manager: str | Setup[Any] = setup_of(using)
    else:
        check_name(using, "transactional(using=...)")
        manager = using

    def decorate(function: Any, /) -> Any:
        kind, inner = _unwrap(function)
        who = _check_function(inner)
        options = Options(
            who=f"{who}()", isolation=isolation, read_only=read_only, propagation=propagation,
            retries=retries, timeout=timeout, retry=retry, retry_on=retry_on,
            settings=layer_of(settings, role, f"{who}()", constants=True),
        )  # fmt: skip
        if not isinstance(manager, str):
            manager.database.system.check_level(isolation, who=options.who)
            if options.settings is not None:
                manager.database.system.check_settings(who=options.who)
        wrapped = _wrap(inner, manager, options)
        return kind(wrapped) if kind else wrapped

    return decorate if func is None else decorate(func)


def _unwrap(function: Any) -> tuple[Any, Any]:
    """Return the class of a classmethod or staticmethod and the function inside, for @transactional above it."""
    if type(function) in (classmethod, staticmethod):
        return cast("Any", type(function)), function.__func__
    return None, function


def _check_function(function: object) -> str:
    """Return the function's name, or refuse it.

    Raises:
        TypeError: not an ``async def`` function.
    """
    name = getattr(function, "__qualname__", repr(function)).rpartition("<locals>.")[2]
    if inspect.iscoroutinefunction(function):
        return str(name)
    if inspect.isasyncgenfunction(function):
        what, remedy = "an async generator", "collect what it yields, or use 'async with manager.begin()' in its caller"
    elif inspect.isgeneratorfunction(function):
        what, remedy = "a generator", "make it an 'async def' that returns a list"
    elif callable(function):
        what, remedy = "not an 'async def' function", "make it one; sync code cannot await an AsyncSession"
    else:
        what, remedy = f"a {type(function).__name__}", "decorate an 'async def' function"
    raise TypeError(f"@transactional got {name}, which is {what}; {remedy}")


def _wrap(function: Callable[..., Any], using: str | Setup[Any], options: Options) -> Any:
    @functools.wraps(function)
    async def transactional_call(*args: Any, **kwargs: Any) -> Any:
        setup, open_unit = locate(using, options.who)
        if options.isolation is not None:  # before joining too, so that it does not depend on the caller
            setup.database.system.check_level(options.isolation, who=options.who)
        unit = joinable(open_unit, options, setup.name)
        if unit is not None:
            async with join(unit, options):
                return await function(*args, **kwargs)
        call: Call[Any] = Call(setup, options)
        if call.retries or before_first_attempt:
            used = None if leaves_all(args, kwargs) else find_used(args, kwargs)
            call.called = function, args, kwargs, await keep(used) if used else NOTHING
        for rehearse in before_first_attempt:
            await rehearse(call, functools.partial(function, *args, **kwargs))
        result: Any = None
        while True:
            async with Attempt(call):
                result = await function(*args, **kwargs)
            if not call.more:  # else the attempt has swallowed its failure
                return result

    vars(transactional_call)["__transactional__"] = options  # how `UnitOfWorkManager.contention` knows it
    return transactional_call
