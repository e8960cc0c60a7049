"""C2 on SQLite, whose COMMIT loses no answer by itself: what a disk or a network file system that fails may do."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from sqla_uow import Status, UnitOfWorkManager, current_unit, transactional

pytestmark = pytest.mark.drivers("sqlite")


@pytest.fixture
def lose(monkeypatch):
    """Return what breaks the next COMMIT of an engine, behind it or before it."""

    def lose(engine, *, applied):
        dialect = engine.sync_engine.dialect
        commit = dialect.do_commit

        def do_commit(connection):
            monkeypatch.undo()
            if applied:
                commit(connection)
            raise OSError

        monkeypatch.setattr(dialect, "do_commit", do_commit)

    return lose


@pytest.fixture(params=[False, True], ids=["", "translated"])
def engine(db, request):
    """An engine; a map of schemas, if it has one, leads to where no markers are."""
    options = {"execution_options": {"schema_translate_map": {None: "elsewhere"}}} if request.param else {}
    return db.engine(**options)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
async def test_a_lost_answer_is_found_out(db, engine, lose, applied, before):
    """The work is there once, whether the first COMMIT has arrived or not, and whether there were others before it."""
    manager = UnitOfWorkManager(engine, ambiguous_commit="verify")
    runs, hooks = [], []

    @transactional(using=manager, retries=1)
    async def write(number):
        unit = current_unit(manager)
        runs.append(unit)
        unit.after_commit(hooks.append, number)
        await unit.session.execute(text("INSERT INTO note (text) VALUES (:text)"), {"text": str(number)})
        if number == "lost" and len(runs) == before + 1:
            lose(engine, applied=applied)

    for number in range(before):
        await write(number)
    await write("lost")
    assert [unit.status for unit in runs[before:]] == (
        [Status.COMMITTED] if applied else [Status.ROLLED_BACK, Status.COMMITTED]
    )
    assert hooks[before:] == ["lost"]
    assert await db.rows("SELECT text FROM note WHERE text = 'lost'") == [("lost",)]
    await write("after")
    assert await db.scalar("SELECT count(*) FROM sqla_uow_commits") == 1
    assert engine.pool.checkedout() == 0
