"""`capture_after_commit`: what would have happened after the commits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from sqla_uow._transaction.hooks import Hook, capturers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["CapturedHook", "capture_after_commit"]


class CapturedHook(NamedTuple):
    """A hook of a unit that has committed; ``await hook()`` runs it.

    Attributes:
        function: what was registered.
        args: what it is called with.
        kwargs: likewise, by name.
    """

    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    async def __call__(self) -> None:
        """Run it, sync or async, as the unit would have."""
        await Hook.of(self.function, self.args, self.kwargs).run()


@contextmanager
def capture_after_commit(*, execute: bool = False) -> Generator[list[CapturedHook]]:
    """Collect the `after_commit` hooks of all units that commit in the block, in order.

    Those of a failed attempt, and of a unit or savepoint that is rolled back, are dropped as ever and not among them.  A block
    within another takes those of its units, and `execute` is its own; the outer block gets the others.

    Args:
        execute: run them as well, where they would run; else they do not run.
    """
    captured: list[CapturedHook] = []

    def take(hooks: list[Hook]) -> None:
        if capturers[-1] is not take:  # those of a block within this one are that block's
            return
        captured.extend(CapturedHook(hook.function, hook.args, hook.kwargs) for hook in hooks)
        if not execute:
            hooks.clear()

    capturers.append(take)
    try:
        yield captured
    finally:
        capturers.remove(take)
