"""Alembic's environment: run by the ``alembic`` command, and by `examples.bank.runner.schema` when the bank starts."""

from __future__ import annotations

import asyncio
from typing import Any

from alembic.util import CommandError
from sqlalchemy.ext.asyncio import create_async_engine

from alembic import context
from examples.bank.models import VERSION_TABLE, Base
from sqla_uow.alembic import install, run_migrations

install()  # op.add_version_column, op.create_version_trigger

url = context.config.attributes.get("url") or context.get_x_argument(as_dictionary=True).get("url")
if not url:
    raise CommandError("the bank's database is not known; pass -x url=postgresql+asyncpg://user@host/database")


def _is_ours(name: str | None, kind: str, _parents: Any) -> bool:
    """Leave the other tables of somebody's database out of what autogenerate compares."""
    return kind != "table" or name in Base.metadata.tables


def _remember(*, step: Any, **_: Any) -> None:
    context.config.attributes.setdefault("applied", []).append(step.up_revision_id)


options = {
    "target_metadata": Base.metadata,
    "version_table": VERSION_TABLE,
    "include_name": _is_ours,
    "on_version_apply": _remember,
}


async def migrate() -> None:
    """Run the migrations, one process at a time: who starts while another one migrates waits, and finds nothing to do."""
    engine = create_async_engine(url)
    try:
        await run_migrations(engine, timeout=10, **options)
    finally:
        await engine.dispose()


if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(migrate())
