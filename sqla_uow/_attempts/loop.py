"""Whether the end of a block leads back to the loop around it.

``async with attempt`` may keep a conflict at COMMIT to itself only if its loop goes on: behind a ``break`` or ``return``
nobody would run the block again, and the caller would take a refused commit for a commit.  Python does not tell a context
manager where control goes next, but the bytecode of the calling frame does.  It is read only after a conflict.
"""

from __future__ import annotations

import dis
import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypeVar

from sqla_uow._attempts.attempt import Attempt
from sqla_uow._attempts.call import Call

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import CodeType, FrameType

    from sqla_uow._unit.options import Options
    from sqla_uow._unit.setup import Setup

__all__ = ["Loop", "LoopedCall", "leads_back", "loop_of"]

S = TypeVar("S", bound=AsyncSession, default=AsyncSession)


class LoopedCall(Call[S]):
    """``async for attempt in ...: async with attempt as unit``: a loop that may be left by ``break`` or ``return``."""

    __slots__ = ("_loop",)

    def __init__(self, setup: Setup[S], options: Options, function: object) -> None:
        super().__init__(setup, options, function)
        self._loop: Loop | None = None

    def __aiter__(self) -> LoopedCall[S]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Attempt[S]]:  # no coroutine function: its caller's frame is the loop's
        if self.more:
            self._loop = loop_of(sys._getframe(1)) if self.retries else None
        return self._next()

    async def _next(self) -> Attempt[S]:
        if not self.more:
            raise StopAsyncIteration
        return Attempt(self)

    def will_go_on(self, frame: FrameType) -> bool:
        """Say whether the end of the block leads back to the loop; if not, nothing may be swallowed."""
        return leads_back(frame, self._loop)


class Loop(NamedTuple):
    """One ``async for``: its frame, and the offset at which the frame asks for the next item."""

    # Not the frame itself: it holds the call, and the call holds this.
    frame: int
    top: int


def loop_of(frame: FrameType) -> Loop | None:
    """Return the ``async for`` that is just calling ``__anext__``; None for ``anext()`` and other callers."""
    instruction = _graph(frame.f_code).at(frame.f_lasti)
    if instruction is None or instruction.opname != "GET_ANEXT":
        return None
    return Loop(id(frame), instruction.offset)


def leads_back(frame: FrameType, loop: Loop | None) -> bool:
    """Say whether `frame`, once the ``__aexit__`` it awaits has kept an error, is sure to come to the top of `loop`.

    False also where that cannot be told: the block stands in another function than the loop, in an `AsyncExitStack`,
    in code of another compiler.
    """
    if loop is None or id(frame) != loop.frame:
        return False
    return _leads_back(frame.f_code, frame.f_lasti, loop.top)


# The end of a block is made of these.  They cannot raise, apart from the block's own truth test.
_SILENT = frozenset({
    "CACHE", "COPY", "END_SEND", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_FORWARD", "LOAD_CONST", "NOP",
    "NOT_TAKEN", "POP_EXCEPT", "POP_TOP", "PUSH_EXC_INFO", "PUSH_NULL", "RESUME", "STORE_FAST", "SWAP",
})  # fmt: skip
_RAISES = frozenset({"RAISE_VARARGS", "RERAISE"})
_NO_FALL_THROUGH = _RAISES | {"JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_FORWARD"}


class _Graph:
    """The instructions of one function, and which may follow which."""

    def __init__(self, code: CodeType) -> None:
        bytecode = dis.Bytecode(code)
        self._instructions = list(bytecode)
        self._index = {instruction.offset: index for index, instruction in enumerate(self._instructions)}
        self._handlers = list(getattr(bytecode, "exception_entries", ()))

    def at(self, offset: int) -> dis.Instruction | None:
        """Return the instruction at `offset`, which may point into its inline cache."""
        while offset >= 0 and offset not in self._index:
            offset -= 2
        return self._instructions[self._index[offset]] if offset >= 0 else None

    def after(self, instruction: dis.Instruction) -> dis.Instruction | None:
        index = self._index[instruction.offset] + 1
        return self._instructions[index] if index < len(self._instructions) else None

    def target(self, instruction: dis.Instruction) -> dis.Instruction | None:
        jumps = instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs
        return self.at(instruction.argval) if jumps else None

    def handler(self, instruction: dis.Instruction) -> dis.Instruction | None:
        entry = next((one for one in self._handlers if one.start <= instruction.offset < one.end), None)
        return None if entry is None else self.at(entry.target)


@functools.lru_cache(maxsize=64)
def _graph(code: CodeType) -> _Graph:
    return _Graph(code)


@functools.lru_cache(maxsize=256)
def _leads_back(code: CodeType, offset: int, top: int) -> bool:
    if sys.implementation.name != "cpython":
        return False
    graph = _graph(code)
    start = _behind_await(graph, graph.at(offset))
    if start is None:
        return False
    seen: set[tuple[int, bool]] = set()
    todo = [(start, False)]
    while todo:
        instruction, raised = todo.pop()
        if instruction.offset == top or (instruction.offset, raised) in seen:
            continue
        seen.add((instruction.offset, raised))
        if _leaves(instruction, raised=raised):
            return False
        todo += _successors(graph, instruction, raised=raised)
    return True


def _behind_await(graph: _Graph, instruction: dis.Instruction | None) -> dis.Instruction | None:
    """Return where the frame goes on once ``__aexit__`` has returned: its value dropped, or true after an exception."""
    if instruction is None or instruction.opname != "SEND":
        return None
    following = graph.target(instruction)
    while following is not None and following.opname in ("END_SEND", "TO_BOOL"):
        following = graph.after(following)
    if following is not None and following.opname.startswith("POP_JUMP") and following.opname.endswith("IF_TRUE"):
        return graph.target(following)
    return following if following is not None and following.opname == "POP_TOP" else None


def _leaves(instruction: dis.Instruction, *, raised: bool) -> bool:
    """Say whether this hands something on as if it were done: a result, an item, an exception that is raised on purpose.

    An exception that *happened* behind the block is a failure for whoever gets it, and never looks like a success.
    """
    if instruction.opname == "RAISE_VARARGS":
        return not raised
    # An async generator's `yield`; the YIELD_VALUE of an `await` has no wrapping before it.
    wraps = instruction.opname == "ASYNC_GEN_WRAP" or instruction.argrepr == "INTRINSIC_ASYNC_GEN_WRAP"
    return wraps or instruction.opname.startswith("RETURN_")


def _successors(graph: _Graph, instruction: dis.Instruction, *, raised: bool) -> list[tuple[dis.Instruction, bool]]:
    following: list[tuple[dis.Instruction | None, bool]] = [(graph.target(instruction), raised)]
    if instruction.opname not in _NO_FALL_THROUGH:
        following.append((graph.after(instruction), raised))
    if instruction.opname not in _SILENT:
        following.append((graph.handler(instruction), True))
    return [(one, was_raised) for one, was_raised in following if one is not None]
