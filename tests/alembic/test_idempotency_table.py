"""The table of idempotency keys: migrations make it, as they make the tables of the program."""

from __future__ import annotations

import pytest
from sqlalchemy import MetaData

from sqla_uow import UnitOfWorkManager
from sqla_uow.idempotency import IdempotencyKeys
from tests.alembic.project import PLAIN, Project
from tests.kit.databases import ONE_OF_EACH

KEYS = "pass\n\n\nfrom sqla_uow.idempotency import IdempotencyKeys\nkeys = IdempotencyKeys(Base.metadata)"


@pytest.mark.drivers(*ONE_OF_EACH)
async def test_autogenerate_makes_the_table(db, tmp_path):
    """With nothing of this library in the migration; it works, there is nothing left to generate, and it can be taken back."""
    await db.run(*(f"DROP TABLE {name}" for name in ("note", "account", "doctor", "uniq", "versioned")))
    project = Project(tmp_path / "project", db.url)
    project.models(**PLAIN | {"lines": KEYS})
    await project.alembic("revision", autogenerate=True, message="keys")
    generated = project.generated("keys")
    assert "op.create_table('uow_idempotency'" in generated
    assert "sqla_uow" not in generated
    for target in ("head", "-1", "head"):
        await project.alembic("upgrade" if target == "head" else "downgrade", target)
    assert "No new upgrade operations detected" in await project.alembic("check")
    keys = IdempotencyKeys(MetaData())
    with UnitOfWorkManager(db.engine()).activate() as manager:
        for first in (True, False):
            async with manager.begin():
                assert await keys.claim("orders", "a", fingerprint=b"5 EUR") is first
