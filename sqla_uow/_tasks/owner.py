"""Which task may use a unit: one at a time."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, Protocol

from sqla_uow._tasks.frames import check_loop, descends, here, running_task
from sqla_uow.errors import TaskBoundaryError

__all__ = ["Owner"]

Task = asyncio.Task[Any]


class Doom(Protocol):
    """What an owner tells of tasks that have used the unit at once."""

    def mark(self, cause: BaseException | None, *, hard: bool) -> None: ...


class Owner:
    """Which task uses a unit: one at a time.  It is handed down to child tasks and back, and never shared by siblings."""

    __slots__ = ("_doom", "_frame", "_held", "_lost", "idle", "in_flight", "last", "loop", "name")

    def __init__(self, name: str, doom: Doom) -> None:
        task = running_task()
        if task is None:
            raise TaskBoundaryError(f"{name} was begun outside any task; begin it in a coroutine that a task runs")
        self.name: str = name
        self.loop: asyncio.AbstractEventLoop = task.get_loop()
        self.last: Task | None = task
        self._frame = here(task)
        self._lost: weakref.WeakSet[Task] | None = None
        self._doom = doom
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
            return task  # the one that holds is always the last one
        return self._admit()

    def begin_operation(self) -> None:
        """Begin an operation on the connection."""
        self.in_flight = self.check()

    def end_operation(self) -> None:
        """End the operation, and wake the end of the unit if that waits for it."""
        self.in_flight = None
        if self.idle is not None and self._held is None and not self.idle.done():
            self.idle.set_result(None)

    def hold(self) -> Task | None:
        """Begin an operation of several steps, such as a flush with the ROLLBACK that SQLAlchemy sends when the flush fails.

        Returns:
            what `let_go` needs.
        """
        before, self._held = self._held, self.check()
        return before

    def let_go(self, before: Task | None) -> None:
        """End what `hold` began."""
        self._held = before
        self.end_operation()

    def busy(self) -> Task | None:
        """Return the task whose operation is in flight."""
        busy = self._held or self.in_flight
        return None if busy is None or busy.done() else busy

    def busy_elsewhere(self) -> asyncio.Future[None] | None:
        """Return what to wait for if another task's operation is in flight, else None."""
        busy = self.busy()
        if busy is None or busy is running_task():
            return None
        self.idle = self.loop.create_future()
        return self.idle

    def is_free(self) -> bool:
        """Say whether the running task could use the unit without taking it from another task."""
        task, last = running_task(), self.last
        busy = self.busy()
        if task is None or (busy is not None and busy is not task):
            return False
        return last is None or last.done() or descends(task, here(task), last)

    def forget_task(self) -> None:
        """Keep no task alive: the unit has ended."""
        self.last = None

    def _admit(self) -> Task:
        try:
            task = check_loop(self.name, self.loop)
        except TaskBoundaryError as error:
            self._doom.mark(error, hard=True)
            raise
        busy = self.busy()
        if busy is not None and busy is not task:
            raise self._sibling(task, busy, "has a statement in flight")
        frame = here(task)
        lost = self._lost
        if lost and any(one in lost for one in frame.tasks()):
            raise self.refuse(
                f"{self.name} was taken back by the task that started {_named(task)}; "
                "finish the child before its parent goes on, or give it a unit of its own with propagation='requires_new'"
            )
        last = self.last
        if last is not None and last is not task and not last.done() and not descends(task, frame, last):
            if not descends(last, self._frame, task):
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
        """Doom the unit because two tasks use it, and return the error to raise."""
        error = TaskBoundaryError(message)
        self._doom.mark(error, hard=True)
        return error


def _named(task: Task) -> str:
    return f"task {task.get_name()!r}"
