"""The only ContextVar, and who may use a unit.

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

    from sqla_uow._transaction.doom import Damage

__all__ = ["Frame", "Owner", "Place", "check_loop", "current_places", "pop", "push", "running_task"]

Task = asyncio.Task[Any]


class Place:
    """Where a unit is looked up.  `closed` is set at its end, so that a copied context cannot use it any more.

    Args:
        key: what it belongs to; an ended place hides those of the same key around it.
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
            "read what the thread needs before, or open a unit inside it"
        )
    return task


def current_places() -> tuple[Place, ...]:
    """Return the places of this context, innermost first; ended ones too, so that nobody falls through them."""
    frame = _frame.get()
    return () if frame is None else frame.places


def _here(task: Task | None) -> Frame:
    """Return this task's frame; record the task where it was inherited."""
    frame = _frame.get()
    if frame is not None and (frame.task() if frame.task is not None else None) is task:
        return frame
    ref = None if task is None else weakref.ref(task)
    if frame is None:
        return Frame((), ref, None)
    # Ended parents are left out, else a task that starts its successor for ever would grow the chain for ever.
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
    frame = _here(running_task())
    places = frame.places
    for one in places:
        if one.closed:
            places = _without_hidden(places)
            break
    _frame.set(Frame((place, *places), frame.task, frame.up))


def _without_hidden(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """Leave out ended places behind an ended one of the same key.

    A task that starts its successor inside its own scope for ever would pile them up for ever.
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

    It may not be: an async generator can be closed in another context than the one it was begun in.  There nothing is
    touched, and whoever still sees the place sees that it has ended.
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
    """Yield the ids of the tasks that anyio started `task` from; it records parents that never looked at our variable.

    Two stacked `BaseHTTPMiddleware` where only the inner one uses the session after `call_next` need this.
    """
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return
    parents = {info.id: info.parent_id for info in anyio.get_running_tasks()}
    current = parents.get(id(task))
    while current is not None:
        yield current
        current = parents.pop(current, None)


def _descends(task: Task, frame: Frame, ancestor: Task) -> bool:
    return any(one is ancestor for one in frame.tasks()) or id(ancestor) in _anyio_ancestors(task)


class Owner:
    """Who uses one unit: one task at a time, handed down to children and back, never shared by siblings."""

    __slots__ = ("_damage", "_frame", "_held", "_lost", "idle", "in_flight", "last", "loop", "name")

    def __init__(self, name: str, damage: Damage) -> None:
        task = running_task()
        if task is None:
            raise TaskBoundaryError(f"{name} was begun outside any task; begin it in a coroutine that a task runs")
        self.name: str = name
        self.loop: asyncio.AbstractEventLoop = task.get_loop()
        self.last: Task | None = task
        self._frame = _here(task)
        self._lost: weakref.WeakSet[Task] | None = None
        self._damage = damage
        self._held: Task | None = None
        self.in_flight: Task | None = None
        self.idle: asyncio.Future[None] | None = None

    def check(self) -> Task:
        """Let the running task use the unit, or raise.

        Raises:
            TaskBoundaryError: another live task uses it, or this is a thread; the unit is doomed.
        """
        try:
            task = asyncio.current_task()
        except RuntimeError:  # a thread without an event loop
            return self._admit()
        if task is not None and task is self.last and (self.in_flight is None or self.in_flight is task):
            return task  # who holds is the last one, too
        return self._admit()

    def enter(self) -> None:
        """Begin an operation on the connection."""
        self.in_flight = self.check()

    def leave(self) -> None:
        """End the operation, and wake the end of the unit if it waits for that."""
        self.in_flight = None
        if self.idle is not None and self._held is None and not self.idle.done():
            self.idle.set_result(None)

    def hold(self) -> Task | None:
        """Make one operation of all that follows: a flush with the ROLLBACK that SQLAlchemy sends when it fails.

        Returns:
            what `let_go` wants to be given.
        """
        before, self._held = self._held, self.check()
        return before

    def let_go(self, before: Task | None) -> None:
        """End what `hold` began."""
        self._held = before
        self.leave()

    def busy(self) -> Task | None:
        """Return the task whose operation is in flight."""
        busy = self._held or self.in_flight
        return None if busy is None or busy.done() else busy

    def busy_elsewhere(self) -> asyncio.Future[None] | None:
        """Return what to wait for while another task's operation is in flight."""
        busy = self.busy()
        if busy is None or busy is running_task():
            return None
        self.idle = self.loop.create_future()
        return self.idle

    def is_free(self) -> bool:
        """Say whether the running task could use the unit, and would take it from nobody."""
        task, last = running_task(), self.last
        busy = self.busy()
        if task is None or (busy is not None and busy is not task):
            return False
        return last is None or last is task or last.done() or _descends(task, _here(task), last)

    def release(self) -> None:
        """Keep no task alive."""
        self.last = None

    def _admit(self) -> Task:
        try:
            task = check_loop(self.name, self.loop)
        except TaskBoundaryError as error:
            self._damage.add(error, hard=True)
            raise
        busy = self.busy()
        if busy is not None and busy is not task:
            raise self._sibling(task, busy, "has a statement in flight")
        frame = _here(task)
        lost = self._lost
        if lost and any(one in lost for one in frame.tasks()):
            raise self.refuse(
                f"{self.name} was taken back by the task that started {_named(task)}; "
                "finish the child before its parent goes on, or give it a unit of its own with propagation='requires_new'"
            )
        last = self.last
        if last is not None and last is not task and not last.done() and not _descends(task, frame, last):
            if not _descends(last, self._frame, task):
                raise self._sibling(task, last, "is still running")
            if lost is None:
                lost = self._lost = weakref.WeakSet()
            lost.add(last)
        self.last = task
        self._frame = frame
        return task

    def _sibling(self, task: Task, other: Task, why: str) -> TaskBoundaryError:
        return self.refuse(
            f"{self.name} was used by {_named(task)} while {_named(other)} uses it and {why}; "
            "await one after the other, or give each task its own unit with propagation='requires_new'"
        )

    def refuse(self, message: str) -> TaskBoundaryError:
        """Doom the unit, because two tasks use it, and return the error to raise."""
        error = TaskBoundaryError(message)
        self._damage.add(error, hard=True)
        return error


def _named(task: Task) -> str:
    return f"task {task.get_name()!r}"
