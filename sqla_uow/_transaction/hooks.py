"""Hooks in order of registration, each dropped with the savepoint under which it was registered."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import logging
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from sqla_uow._log import log
from sqla_uow._tasks.frames import running_task
from sqla_uow._tasks.shield import shielded
from sqla_uow.errors import UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ROUNDS", "Hook", "HookOutcome", "Hooks", "being_run", "capturers", "run_after_commit", "run_after_rollback"]

HOOK_SECONDS = 10.0
"""How long the hooks may still take after their caller was cancelled."""

ROUNDS = 100
"""How often hooks may make more hooks, or more to flush.  SQLAlchemy itself gives up after as many flushes."""

_numbers = itertools.count()


class Hook(NamedTuple):
    """A function, sync or async, its arguments, and its number in the order of registration."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int

    @classmethod
    def of(cls, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        if not callable(function):  # a coroutine, for example, which would be noticed only after COMMIT
            raise TypeError(
                f"a hook is of type {type(function).__name__}, which cannot be called; pass the function, and its arguments "
                "after it: after_commit(send, address)"
            )
        return cls(function, args, kwargs, next(_numbers))

    @property
    def name(self) -> str:
        """What messages call it.  Its repr would show the arguments of a partial, or the object of a method."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return str(getattr(function, "__qualname__", type(function).__qualname__))

    async def run(self) -> None:
        result = self.function(*self.args, **self.kwargs)
        if inspect.isawaitable(result):
            await result


capturers: list[Callable[[list[Hook]], None]] = []
"""Each is called with the `after_commit` hooks of every unit that commits; a hook it removes is not run."""


class Hooks:
    """The hooks of one unit.

    A savepoint remembers how many hooks there were when it began (`counts`).  Rolling it back drops those that came later, so
    nesting needs no tree.  `undone` keeps the rollback hooks of rolled-back savepoints until they can run.
    """

    __slots__ = ("after_commit", "after_rollback", "before_commit", "undone")

    def __init__(self) -> None:
        self.after_commit: list[Hook] = []
        self.before_commit: list[Hook] = []
        self.after_rollback: list[Hook] = []
        self.undone: list[Hook] = []

    def counts(self) -> tuple[int, int, int]:
        return len(self.after_commit), len(self.before_commit), len(self.after_rollback)

    def due_after_rollback(self) -> list[Hook]:
        """Return the rollback hooks of the unit and of the savepoints undone before, in order of registration."""
        # A savepoint on the server may begin later than the session's own, and is undone first.
        return sorted(self.undone + self.after_rollback, key=lambda hook: hook.number)

    def drop(self, counts: tuple[int, int, int]) -> None:
        """Forget the hooks that were registered since `counts`; their rollback hooks are to run."""
        del self.after_commit[counts[0] :]
        del self.before_commit[counts[1] :]
        self.undone.extend(self.after_rollback[counts[2] :])
        del self.after_rollback[counts[2] :]


_Kind: TypeAlias = Literal["after_commit", "after_rollback"]

_running: WeakKeyDictionary[asyncio.Task[Any], tuple[_Kind, list[Hook]]] = WeakKeyDictionary()


def being_run(kind: _Kind) -> list[Hook] | None:
    """Return the hooks of this kind that this task is running; a hook may add to them."""
    task = running_task()
    running = None if task is None else _running.get(task)
    return running[1] if running is not None and running[0] == kind else None


_Cancelled: TypeAlias = "asyncio.CancelledError | None"
_Note: TypeAlias = "Callable[[Hook, Exception], None]"


class HookOutcome(NamedTuple):
    """What came of hooks.

    Attributes:
        fatal: what a hook raised to end the program or the test: neither an `Exception` nor a cancellation.
        cancelled: the cancellation of the caller, before the hooks or meanwhile.
    """

    fatal: BaseException | None
    cancelled: _Cancelled


async def run_after_commit(hooks: Hooks, who: str, cancelled: _Cancelled) -> tuple[list[Exception], HookOutcome]:
    """Run the hooks of a commit; return what they raised, and the outcome."""
    for capture in capturers:
        capture(hooks.after_commit)
    failures: list[Exception] = []
    return failures, await _bounded(
        ("after_commit", hooks.after_commit), who, lambda _, error: failures.append(error), cancelled
    )


async def run_after_rollback(hooks: Hooks, who: str, cancelled: _Cancelled) -> HookOutcome:
    """Run the hooks of a rollback.  What they raise is logged, as the caller must see why the unit was rolled back."""
    due, hooks.undone = hooks.due_after_rollback(), []
    hooks.after_rollback[:] = due  # further hooks are added here
    if not due:
        return HookOutcome(None, cancelled)
    return await _bounded(("after_rollback", hooks.after_rollback), who, _log, cancelled)


async def _bounded(running: tuple[_Kind, list[Hook]], who: str, note: _Note, cancelled: _Cancelled) -> HookOutcome:
    work = functools.partial(_run, running, who, note)
    outcome = await shielded(work, grace=HOOK_SECONDS, limit=math.inf if cancelled is None else HOOK_SECONDS)
    if outcome.stop():
        log(
            logging.ERROR, "hooks of %s took more than %s s after a cancellation; stopped", who, HOOK_SECONDS,
            function=who,
        )  # fmt: skip
    return HookOutcome(outcome.task.result() if outcome.finished else None, cancelled or outcome.cancelled)


async def _run(running: tuple[_Kind, list[Hook]], who: str, note: _Note) -> BaseException | None:
    """Run all hooks, also those registered meanwhile, in a task of their own; return what is to end the program."""
    task = asyncio.current_task()
    assert task is not None
    _running[task] = running
    hooks = running[1]
    fatal: BaseException | None = None
    rounds, left = 0, len(hooks)
    while hooks:
        if left == 0:
            rounds, left = rounds + 1, len(hooks)
        hook = hooks.pop(0)
        left -= 1
        if rounds == ROUNDS:
            note(hook, _endless(hook, who))
            break
        try:
            await hook.run()
        except Exception as error:
            note(hook, error)
        except asyncio.CancelledError as error:
            if task.cancelling():  # the time for hooks is up
                raise
            note(hook, _cancelled(hook, error))
        except BaseException as error:
            # Raised again when all hooks have run: if it left this task now, SystemExit would end the loop before the rest.
            fatal = fatal or error
    return fatal


def _log(hook: Hook, error: Exception) -> None:
    log(
        logging.ERROR, "after_rollback hook %s failed; the rollback itself is done", hook.name,
        exc_info=error, hook=hook.name, error=error,
    )  # fmt: skip


def _endless(hook: Hook, who: str) -> Exception:
    return UnitOfWorkError(
        f"hooks of {who} registered further hooks {ROUNDS} times over; {hook.name} is not run: let the chain end, "
        "or call the next function directly"
    )


def _cancelled(hook: Hook, error: asyncio.CancelledError) -> Exception:
    """Turn a cancellation that is the hook's own, such as that of a task it awaited, into an exception."""
    failure = UnitOfWorkError(f"hook {hook.name} awaited what was cancelled; let it catch that")
    failure.__cause__ = error
    return failure
