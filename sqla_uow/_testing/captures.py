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
        function: the function that was registered.
        args: the positional arguments that it is called with.
        kwargs: the keyword arguments that it is called with.
    """

    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    async def __call__(self) -> None:
        """Run the hook, sync or async, as the unit would have."""
        await Hook.of(self.function, self.args, self.kwargs).run()


@contextmanager
def capture_after_commit(*, execute: bool = False) -> Generator[list[CapturedHook]]:
    """Collect the `after_commit` hooks of all units that commit in the block, in order.

    Hooks of a failed attempt, and of a unit or savepoint that is rolled back, are dropped as always; they are not
    collected.  A block within another collects the hooks of its own units, and has its own `execute`; the outer block
    collects the others.

    Args:
        execute: run the hooks as well, at the time at which they would run; without it they do not run.
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
