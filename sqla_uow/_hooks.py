"""Hooks in order of registration, each dropped with the savepoint under which it was registered."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from sqla_uow._records import record
from sqla_uow._shield import Shielded, shielded
from sqla_uow._tasks import running_task
from sqla_uow.errors import UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Hook", "Hooks", "being_run", "run_after_commit", "run_after_rollback", "takers"]

T = TypeVar("T")

HOOK_SECONDS = 10.0
"""How long the hooks may still take after their caller was cancelled."""

_numbers = itertools.count()


class Hook(NamedTuple):
    """A function, sync or async, what to call it with, and its place in the order of registration."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int

    @classmethod
    def of(cls, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        if not callable(function):  # a coroutine, say: it would be found out only behind COMMIT
            raise TypeError(
                f"a hook is of type {type(function).__name__}, which cannot be called; pass the function, and its arguments "
                "behind it: after_commit(send, address)"
            )
        return cls(function, args, kwargs, next(_numbers))

    @property
    def name(self) -> str:
        """What messages call it: not its repr, which would show the arguments of a partial, or the object of a method."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return str(getattr(function, "__qualname__", type(function).__qualname__))

    async def run(self) -> None:
        result = self.function(*self.args, **self.kwargs)
        if inspect.isawaitable(result):
            await result


takers: list[Callable[[list[Hook]], None]] = []
"""Called with the `after_commit` hooks of each unit that has committed with some; what they take out does not run."""


class Hooks:
    """The hooks of one unit.

    A savepoint remembers how many hooks there were when it began (`mark`); rolling it back drops those that came later,
    so that nesting needs no tree.  `undone` keeps the rollback hooks of rolled-back savepoints until they can run.
    """

    __slots__ = ("after_commit", "after_rollback", "before_commit", "undone")

    def __init__(self) -> None:
        self.after_commit: list[Hook] = []
        self.before_commit: list[Hook] = []
        self.after_rollback: list[Hook] = []
        self.undone: list[Hook] = []

    def mark(self) -> tuple[int, int, int]:
        return len(self.after_commit), len(self.before_commit), len(self.after_rollback)

    def due_after_rollback(self) -> list[Hook]:
        """Return the rollback hooks of the unit and of the savepoints undone before, in order of registration."""
        # A savepoint on the server may begin later than the session's own, and is undone first.
        return sorted(self.undone + self.after_rollback, key=lambda hook: hook.number)

    def drop(self, mark: tuple[int, int, int]) -> None:
        """Forget what was registered since `mark`; its rollback hooks are due."""
        del self.after_commit[mark[0] :]
        del self.before_commit[mark[1] :]
        self.undone.extend(self.after_rollback[mark[2] :])
        del self.after_rollback[mark[2] :]


_running: WeakKeyDictionary[asyncio.Task[Any], list[Hook]] = WeakKeyDictionary()


def being_run() -> list[Hook] | None:
    """Return the hooks that this task is running, to which a hook may add."""
    task = running_task()
    return None if task is None else _running.get(task)


_Cancelled = asyncio.CancelledError | None


async def run_after_commit(hooks: Hooks, who: str, cancelled: _Cancelled) -> tuple[list[Exception], _Cancelled]:
    """Run the hooks of a commit; return what they raised, and the cancellation of the caller, before or meanwhile."""
    for take in takers:
        take(hooks.after_commit)
    outcome = await _bounded(functools.partial(_run_collecting, hooks.after_commit), who, cancelled)
    return outcome.task.result() if outcome.finished else [], cancelled or outcome.cancelled


async def run_after_rollback(hooks: Hooks, who: str, cancelled: _Cancelled) -> _Cancelled:
    """Run the hooks of what was rolled back; return the cancellation of the caller, before or meanwhile."""
    due = hooks.due_after_rollback()
    if due:
        outcome = await _bounded(functools.partial(_run_best_effort, due), who, cancelled)
        cancelled = cancelled or outcome.cancelled
    return cancelled


async def _bounded(work: Callable[[], Coroutine[Any, Any, T]], who: str, cancelled: _Cancelled) -> Shielded[T]:
    outcome = await shielded(work, grace=HOOK_SECONDS, limit=math.inf if cancelled is None else HOOK_SECONDS)
    if outcome.stop():
        record(
            logging.ERROR, "hooks of %s took more than %s s after a cancellation; stopped", who, HOOK_SECONDS,
            function=who,
        )  # fmt: skip
    return outcome


async def _run_collecting(hooks: list[Hook]) -> list[Exception]:
    """Run all, also those that are registered meanwhile, and return what they raised; in a task of its own."""
    task = asyncio.current_task()
    assert task is not None
    _running[task] = hooks
    failures: list[Exception] = []
    while hooks:
        hook = hooks.pop(0)
        try:
            await hook.run()
        except Exception as error:
            failures.append(error)
        except asyncio.CancelledError as error:
            if task.cancelling():  # the time for hooks is up
                raise
            failures.append(_cancelled(hook, error))
    return failures


def _cancelled(hook: Hook, error: asyncio.CancelledError) -> Exception:
    """Make an exception of a cancellation that is the hook's own, such as that of a task it awaited."""
    failure = UnitOfWorkError(f"after_commit hook {hook.name} awaited what was cancelled; let it catch that")
    failure.__cause__ = error
    return failure


async def _run_best_effort(hooks: list[Hook]) -> None:
    """Run all and log what they raise: the exception that rolled the unit back is what the caller must see."""
    task = asyncio.current_task()
    while hooks:
        hook = hooks.pop(0)
        try:
            await hook.run()
        except (Exception, asyncio.CancelledError) as error:
            if task is not None and task.cancelling():
                raise
            record(
                logging.ERROR, "after_rollback hook %s failed; the rollback itself is done", hook.name,
                exc_info=error, hook=hook.name, error=error,
            )  # fmt: skip
