"""Any nesting of frames, writes, hooks and failures does what a model of ten lines a rule says.

Rows and hook lists are compared together: a hook that runs for what is not there is as wrong as a row too many.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import Status, UnitOfWorkManager, errors
from tests.kit.models import Base, Note, Unique

pytestmark = pytest.mark.drivers("sqlite")
DEEPEST = 6
HARD = -1  # the depth of a mark that no savepoint's rollback clears


class Level:
    """What the model knows of one open frame."""

    def __init__(self, frame, *, joined, savepoint, rows, hooks):
        self.frame = frame
        self.joined = joined
        self.savepoint = savepoint
        self.rows = rows
        self.hooks = hooks


class Nesting(RuleBasedStateMachine):
    """A unit with frames in it, opened and left one by one, and the model beside it."""

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "test.db"
        self.engine = create_async_engine(f"sqlite+aiosqlite:///{path}", pool_size=1, max_overflow=0)
        self.observer = sqlite3.connect(path, isolation_level=None)
        self.runner.run(self.create())
        self.manager = UnitOfWorkManager(self.engine)
        self.numbers = itertools.count(1)
        self.calls = []
        self.levels = []
        self.unit = None
        # the model
        self.durable = []
        self.expected_calls = []

    async def create(self):
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Unique).values(name="taken"))

    def teardown(self):
        while self.levels:
            self.leave(0)
        self.runner.run(self.engine.dispose())
        self.runner.close()
        self.observer.close()
        self.folder.cleanup()

    # -- the model

    @property
    def depth(self):
        """How many savepoints are open."""
        return sum(level.savepoint for level in self.levels)

    def doom(self, *, hard=False):
        """Mark the depth, which a savepoint's rollback may clear."""
        if self.doomed is None or hard:
            self.doomed = HARD if hard else self.depth

    def undo(self, level):
        """Roll the model back to a savepoint."""
        depth = self.depth + 1  # it has been popped
        if self.doomed is not None and self.doomed >= depth:
            self.doomed = None
        self.rows = level.rows
        self.undone += [hook for hook in self.hooks if hook not in level.hooks]
        self.hooks = level.hooks

    def end(self, error):
        """End the model's unit; return what is to be raised."""
        if error is None and self.doomed is None:
            self.durable += self.rows
            self.expected_calls += [f"commit {hook}" for hook in self.hooks]
            self.expected_calls += [f"rollback {hook}" for hook in sorted(self.undone)]
            return None
        self.expected_calls += [f"rollback {hook}" for hook in sorted(self.undone + self.hooks)]
        return error if error is not None or self.quiet else errors.RollbackOnlyError

    # -- frames

    def enter(self, make, *, joined, savepoint):
        async def enter():
            frame = make()  # in the context of the runner, where the unit is open
            return frame, await frame.__aenter__()

        frame, entered = self.runner.run(enter())
        self.levels.append(
            Level(frame, joined=joined, savepoint=savepoint, rows=list(self.rows), hooks=list(self.hooks))
        )
        return entered

    @precondition(lambda self: not self.levels)
    @rule()
    def begin(self):
        self.rows, self.hooks, self.undone, self.doomed, self.quiet = [], [], [], None, False
        self.unit = self.enter(self.manager.begin, joined=False, savepoint=False)

    @precondition(lambda self: 0 < len(self.levels) < DEEPEST)
    @rule()
    def join(self):
        joining = functools.partial(self.manager.begin, propagation="required")
        assert self.enter(joining, joined=True, savepoint=False) is self.unit

    @precondition(lambda self: 0 < len(self.levels) < DEEPEST and self.doomed is None)
    @rule(of_session=st.booleans())
    def nest(self, of_session):
        nested = functools.partial(self.manager.begin, propagation="nested")
        make = self.unit.session.begin_nested if of_session else nested
        self.enter(make, joined=not of_session, savepoint=True)

    @precondition(lambda self: self.levels)
    @rule(uncaught=st.integers(0, 3))
    def leave(self, uncaught):
        """Leave normally; what is raised for that goes through some more frames before somebody catches it."""
        self.go(None, uncaught)

    @precondition(lambda self: self.levels)
    @rule(uncaught=st.integers(0, 3))
    def fail(self, uncaught):
        """Leave by an exception, through some frames."""
        self.go(KeyError(), uncaught)

    def go(self, error, uncaught):
        for _ in range(uncaught + 1):
            if not self.levels:
                break
            level = self.levels.pop()
            raised = self.runner.run(self.exit(level.frame, error))
            assert type(raised) is self.expected(level, error)
            if not self.levels:
                self.check_end(committed=raised is None and self.doomed is None)
            error = raised
            if error is None:
                break

    async def exit(self, frame, error):
        """Leave a frame; return what goes on from there."""
        try:
            assert not await frame.__aexit__(type(error) if error else None, error, None) or error is None
        except (KeyError, errors.RollbackOnlyError) as raised:
            return raised
        return error

    def expected(self, level, error):
        """Leave a frame of the model; return the type of what goes on from there."""
        kind = type(error) if error is not None else None
        if not self.levels:
            return self.end(kind) or type(None)
        if level.savepoint and (kind is not None or self.doomed is not None):
            self.undo(level)
            return kind or errors.RollbackOnlyError
        if kind is not None:
            self.doom()
        return kind or type(None)

    def check_end(self, *, committed):
        assert self.unit.status is (Status.COMMITTED if committed else Status.ROLLED_BACK)
        rows = [int(row[0]) for row in self.observer.execute("SELECT text FROM note ORDER BY id")]
        assert rows == self.durable
        assert self.calls == self.expected_calls
        assert self.engine.pool.checkedout() == 0

    # -- in a frame

    def attempt(self, step):
        """Do a step and swallow what it raises."""
        try:
            self.runner.run(step)
        except (IntegrityError, StatementError, errors.RollbackOnlyError) as error:
            return type(error)
        return None

    def refused(self, raised):
        """Assert that a doomed unit, and only such a one, refuses SQL."""
        assert (raised is errors.RollbackOnlyError) is (self.doomed is not None)
        return raised is errors.RollbackOnlyError

    @precondition(lambda self: self.levels)
    @rule(by_flush=st.booleans())
    def write(self, by_flush):
        number = next(self.numbers)
        if not self.refused(self.attempt(self.insert(Note(id=number, text=str(number)), by_flush=by_flush))):
            self.rows.append(number)

    @precondition(lambda self: self.levels)
    @rule(by_flush=st.booleans())
    def violate(self, by_flush):
        raised = self.attempt(self.insert(Unique(id=next(self.numbers), name="taken"), by_flush=by_flush))
        if not self.refused_or_violated(raised):
            # SQLAlchemy rolls back the innermost transaction after a failed flush; outside savepoints, all of it.
            self.doom(hard=by_flush and not self.depth)

    def refused_or_violated(self, raised):
        if self.doomed is not None:
            return self.refused(raised)
        assert raised is IntegrityError
        return False

    async def insert(self, instance, *, by_flush):
        session = self.unit.session
        if not by_flush:
            values = {key: value for key, value in vars(instance).items() if not key.startswith("_")}
            await session.execute(insert(type(instance)).values(**values))
            return
        session.add(instance)
        try:
            await session.flush()
        except errors.RollbackOnlyError:
            session.expunge(instance)
            raise

    @precondition(lambda self: self.levels)
    @rule()
    def forget_a_parameter(self):
        """Fail before anything is sent."""
        raised = self.attempt(self.unit.session.execute(text("SELECT :missing"), {"other": 1}))
        if self.doomed is None:
            assert raised is StatementError

    @precondition(lambda self: self.levels)
    @rule()
    def register(self):
        number = next(self.numbers)
        self.unit.after_commit(self.calls.append, f"commit {number}")
        self.unit.after_rollback(self.calls.append, f"rollback {number}")
        self.hooks.append(number)

    @precondition(lambda self: self.levels)
    @rule()
    def doom_it(self):
        """Doom by hand: the owner's own wish if no joined call is open, and no error then."""
        self.unit.doom("for the model")
        if self.doomed != HARD:
            self.quiet = not any(level.joined for level in self.levels)
        self.doom(hard=True)


TestNesting = Nesting.TestCase
TestNesting.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
