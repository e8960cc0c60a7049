"""Units of work for SQLAlchemy's asyncio: transactions that are right.

The tour:

* Make one engine, and one `UnitOfWorkManager` over it.  Activate the manager where your program runs.
* Write service functions with `transactional`.  Inside, `current_session` is the session, and nobody passes it around.
* The outermost function owns the unit of work: one session, one transaction, committed at its end.  Conflicts that the
  database reports, also at COMMIT, are retried with backoff; the others join.
* `after_commit` is for what must happen once, and only if the work is committed.

::

    @transactional(retries=5, isolation="SERIALIZABLE")
    async def transfer(source: int, target: int, amount: Decimal) -> None:
        session = current_session()
        payer = await session.get_one(Account, source)
        ...
        after_commit(notify, source, amount)

    manager = UnitOfWorkManager(create_async_engine("postgresql+asyncpg://..."))

    with manager.activate():
        await transfer(1, 2, Decimal(10))

The errors are in `sqla_uow.errors`.
"""

from sqla_uow import errors
from sqla_uow._classify import is_retryable
from sqla_uow._context import after_commit, after_rollback, before_commit, current_session, current_unit
from sqla_uow._decorator import transactional
from sqla_uow._manager import UnitOfWorkManager
from sqla_uow._retry import RetryPolicy
from sqla_uow._scope import Scope
from sqla_uow._unit import UnitOfWork
from sqla_uow.typing import IsolationLevel, Propagation, Status

__all__ = [
    "IsolationLevel",
    "Propagation",
    "RetryPolicy",
    "Scope",
    "Status",
    "UnitOfWork",
    "UnitOfWorkManager",
    "after_commit",
    "after_rollback",
    "before_commit",
    "current_session",
    "current_unit",
    "errors",
    "is_retryable",
    "transactional",
]
