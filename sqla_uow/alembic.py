"""Version columns and tenant policies in Alembic's migrations, safe on a live table, run by one process at a time.

In ``env.py``::

    from sqla_uow.alembic import install, run_migrations

    install()

    async def migrate() -> None:
        engine = create_async_engine(url)
        try:
            await run_migrations(engine, target_metadata=Base.metadata)
        finally:
            await engine.dispose()

    asyncio.run(migrate())

In migrations, written by hand or by ``alembic revision --autogenerate``::

    op.add_version_column("order")
    op.create_version_trigger("order")

* ``op.add_version_column``, ``op.drop_version_column`` and ``op.rename_version_column``, also within
  ``batch_alter_table``; ``op.create_version_trigger`` and ``op.drop_version_trigger``.  The classes of the operations
  document their arguments.
* ``op.create_tenant_policy`` and ``op.drop_tenant_policy``, on PostgreSQL.
* `migration_lock` lets one runner at a time migrate a database; `run_migrations` does what an async ``env.py`` has to
  do, with that lock.
"""

from functools import cache

from sqla_uow._alembic.autogenerate import register_renderers
from sqla_uow._alembic.impl import adapt_dialects
from sqla_uow._alembic.operations import (
    AddVersionColumnOp,
    CreateVersionTriggerOp,
    DropVersionColumnOp,
    DropVersionTriggerOp,
    RenameVersionColumnOp,
    register,
)
from sqla_uow._alembic.policies import CreateTenantPolicyOp, DropTenantPolicyOp, register_policies
from sqla_uow._alembic.run import migration_lock, run_migrations
from sqla_uow._versions.kinds import UtcTimestamp

__all__ = [
    "AddVersionColumnOp",
    "CreateTenantPolicyOp",
    "CreateVersionTriggerOp",
    "DropTenantPolicyOp",
    "DropVersionColumnOp",
    "DropVersionTriggerOp",
    "RenameVersionColumnOp",
    "UtcTimestamp",
    "install",
    "migration_lock",
    "run_migrations",
]


@cache
def install() -> None:
    """Make Alembic know the operations and write them into the migrations it generates; call it in ``env.py``.

    A second call does nothing.  A renderer that was registered before still renders everything except version columns.
    """
    register()
    register_policies()
    register_renderers()
    adapt_dialects()
