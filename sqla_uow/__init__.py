"""Units of work for SQLAlchemy's asyncio: transactions that are right.

The tour:

* Make one engine, and one `UnitOfWorkManager` over it.  Activate the manager where your program runs.
* Write service functions with `transactional`.  Inside, `current_session` is the session, and nobody passes it around.
* The outermost function owns the unit of work: one session, one transaction, committed at its end.  Transactional
  functions that it calls join it.  Conflicts that the database reports, at COMMIT too, are retried with backoff.
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

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqla_uow import errors
    from sqla_uow._api.current import after_commit, after_rollback, before_commit, current_session, current_unit
    from sqla_uow._api.manager import UnitOfWorkManager
    from sqla_uow._api.proxy import session_proxy
    from sqla_uow._api.scoping import scope
    from sqla_uow._api.transactional import transactional
    from sqla_uow._databases.failures import is_retryable
    from sqla_uow._retry.policy import RetryPolicy
    from sqla_uow._scope.scope import Scope
    from sqla_uow._unit.unit import UnitOfWork
    from sqla_uow.typing import IsolationLevel, Propagation, Status

    __version__: str

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
    "scope",
    "session_proxy",
    "transactional",
]

# Imported when asked for, once: pytest loads `sqla_uow.pytest_plugin`, and so this, wherever sqla-uow is installed.
_MODULES = {
    "IsolationLevel": "typing",
    "Propagation": "typing",
    "RetryPolicy": "_retry.policy",
    "Scope": "_scope.scope",
    "Status": "typing",
    "UnitOfWork": "_unit.unit",
    "UnitOfWorkManager": "_api.manager",
    "after_commit": "_api.current",
    "after_rollback": "_api.current",
    "before_commit": "_api.current",
    "current_session": "_api.current",
    "current_unit": "_api.current",
    "is_retryable": "_databases.failures",
    "scope": "_api.scoping",
    "session_proxy": "_api.proxy",
    "transactional": "_api.transactional",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("sqla_uow.errors")
    if name == "__version__":  # reading the metadata takes longer than all of this module
        return import_module("importlib.metadata").version("sqla-uow")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
