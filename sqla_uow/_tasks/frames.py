"""The only ContextVar, and which task descends from which.

The variable holds a `Frame`: the *places* (activated managers, scopes and units, innermost first) and the task that saw
them last.  A child task copies the variable; as soon as it looks, it records itself
above the frame it inherited.  So the frames of a task are its ancestry, without patching asyncio.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqla_uow.errors import TaskBoundaryError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Frame", "Place", "check_loop", "current_places", "descends", "here", "pop", "push", "running_task"]

Task = asyncio.Task[Any]


class Place:
    """Where a unit is looked up.  Its end sets `closed`, so that a copied context cannot use it any more.

    Args:
        key: the manager that it belongs to; an ended place hides those of the same key around it.
    """

    __slots__ = ("closed", "key")

    def __init__(self, key: object) -> None:
        self.key: object = key
        self.closed: bool = False


class Frame:
    """One task's view: the places, innermost first, the task, and the frame it inherited from its parent."""

    __slots__ = ("places", "task", "up")

    def __init__(self, places: tuple[Place, ...], task: weakref.ref[Task] | None, up: Frame | None) -> None:
        self.places = places
        self.task = task
        self.up = up

    def tasks(self) -> Iterator[Task]:
        """Yield this task and the live ones it descends from, nearest first."""
        frame: Frame | None = self
        while frame is not None:
            task = frame.task() if frame.task is not None else None
            if task is not None:
                yield task
            frame = frame.up


_frame: ContextVar[Frame | None] = ContextVar("sqla_uow.frame", default=None)


def running_task() -> Task | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without an event loop
        return None


def check_loop(name: str, loop: asyncio.AbstractEventLoop) -> Task:
    """Return the running task if it runs on `loop`.

    Raises:
        TaskBoundaryError: this is a thread, with or without an event loop of its own.
    """
    task = running_task()
    if task is None or task.get_loop() is not loop:
        raise TaskBoundaryError(
            f"{name} was used from a thread other than the one of its event loop; "
            "read beforehand what the thread needs, or open a unit inside it"
        )
    return task


def current_places() -> tuple[Place, ...]:
    """Return the places of this context, innermost first, with the ended ones: these hide what is around them."""
    frame = _frame.get()
    return () if frame is None else frame.places


def here(task: Task | None) -> Frame:
    """Return this task's frame; record the task where it was inherited."""
    frame = _frame.get()
    if frame is not None and (frame.task() if frame.task is not None else None) is task:
        return frame
    ref = None if task is None else weakref.ref(task)
    if frame is None:
        return Frame((), ref, None)
    # Ended parents are left out: if each task starts its successor, the chain would grow for ever.
    up: Frame | None = frame
    while up is not None and (up.task is None or (parent := up.task()) is None or parent.done()):
        up = up.up
    if up is not None:
        while up.up is not None and (up.up.task is None or (parent := up.up.task()) is None or parent.done()):
            up.up = up.up.up
    mine = Frame(frame.places, ref, up)
    _frame.set(mine)
    return mine


def push(place: Place) -> None:
    """Make `place` the innermost one of this task's context."""
    frame = here(running_task())
    places = frame.places
    for one in places:
        if one.closed:
            places = _without_hidden(places)
            break
    _frame.set(Frame((place, *places), frame.task, frame.up))


def _without_hidden(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """Leave out ended places that an ended one of the same key hides.

    If each task starts its successor inside its own scope, they would pile up for ever.
    """
    ended: set[int] = set()
    kept: list[Place] = []
    for place in places:
        if not place.closed:
            kept.append(place)
        elif id(place.key) not in ended:
            ended.add(id(place.key))
            kept.append(place)
    return tuple(kept)


def pop(place: Place) -> None:
    """End `place`, and take it off this context if it is here.

    It may not be here: an async generator can be closed in another context than the one it was begun in.  Then this context stays
    as it is, and code that still sees the place sees that it has ended.
    """
    place.closed = True
    frame = _frame.get()
    if frame is None:
        return
    places = frame.places
    if places and places[0] is place:
        _frame.set(Frame(places[1:], frame.task, frame.up))
    elif place in places:
        _frame.set(Frame(tuple(one for one in places if one is not place), frame.task, frame.up))


def _anyio_ancestors(task: Task) -> Iterator[int]:
    """Yield the ids of the tasks from which anyio started `task`, also of those that never looked at our variable.

    Needed for two `BaseHTTPMiddleware`, one in the other, if only the inner one uses the session after `call_next`.
    """
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return
    parents = {info.id: info.parent_id for info in anyio.get_running_tasks()}
    current = parents.get(id(task))
    while current is not None:
        yield current
        current = parents.pop(current, None)


def descends(task: Task, frame: Frame, ancestor: Task) -> bool:
    return any(one is ancestor for one in frame.tasks()) or id(ancestor) in _anyio_ancestors(task)
