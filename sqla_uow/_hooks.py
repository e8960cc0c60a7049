"""Hooks in order of registration, each dropped with the savepoint under which it was registered."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Hook", "Hooks", "run_best_effort", "run_collecting"]

logger = logging.getLogger("sqla_uow")


class Hook(NamedTuple):
    """A function, sync or async, and what to call it with."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    async def run(self) -> None:
        result = self.function(*self.args, **self.kwargs)
        if inspect.isawaitable(result):
            await result


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

    def drop(self, mark: tuple[int, int, int]) -> None:
        """Forget what was registered since `mark`; its rollback hooks are due."""
        del self.after_commit[mark[0] :]
        del self.before_commit[mark[1] :]
        self.undone.extend(self.after_rollback[mark[2] :])
        del self.after_rollback[mark[2] :]


async def run_collecting(hooks: list[Hook]) -> list[Exception]:
    """Run all, also those that are registered meanwhile, and return what they raised."""
    failures: list[Exception] = []
    while hooks:
        try:
            await hooks.pop(0).run()
        except Exception as error:
            failures.append(error)
    return failures


async def run_best_effort(hooks: list[Hook]) -> None:
    """Run all and log what they raise: the exception that rolled the unit back is what the caller must see."""
    while hooks:
        hook = hooks.pop(0)
        try:
            await hook.run()
        except Exception:
            logger.exception("after_rollback hook %r failed; the rollback itself is done", hook.function)
