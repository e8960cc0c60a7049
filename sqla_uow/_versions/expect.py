"""What a body says about versions: which one a client has seen, and that an object needs a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import inspect
from sqlalchemy.orm import object_session
from sqlalchemy.orm.attributes import flag_dirty

from sqla_uow._session.instances import describe
from sqla_uow._transaction.phase import Phase
from sqla_uow._transaction.transaction import Transaction, transaction_of
from sqla_uow._versions.expectations import Expectation, versions_of
from sqla_uow._versions.mapping import VersionMixin, attribute_of, check_type
from sqla_uow.errors import NoUnitError, ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import InstanceState

__all__ = ["expect_version", "get_versioned", "touch"]

V = TypeVar("V", bound=VersionMixin)


def expect_version(instance: VersionMixin, version: Any, /) -> None:
    """Let the unit succeed only if nobody has changed this object since the client saw that version of it.

    The version is compared at once, again before the object is written, and by the UPDATE itself.  If the body does not
    change the object, one locking SELECT before COMMIT compares it.  A unit that expects a version never retries a
    stale one, whatever its `retries`: running the body again does not change what the client has seen.

    Args:
        instance: an object with a version mixin, in the session of an open unit.
        version: what the client has seen: an int, a UUID or an aware datetime, as the model has it.

    Raises:
        StaleVersionError: the object is at another version.
        NoUnitError: the object is in no open unit.
        ReadOnlyError: it is in the read session of a scope, which ends before anything is written.
        TypeError: `version` is not of the type of this model's versions.
        ValueError: the object has no row yet.
    """
    transaction, state = _unit_of(instance, "expect_version()")
    if transaction.scope_read:
        raise ReadOnlyError(transaction.read_only_message(f"expect_version() was called for {describe(instance)}"))
    if state.key is None:
        raise ValueError(f"{describe(instance)} has no row yet, so nobody can have seen a version of it")
    check_type(state.mapper, version)
    found = state.dict.get(attribute_of(state.mapper))
    if found is not None and found != version:
        raise Expectation(instance, version).stale(found)
    versions_of(transaction).expect(instance, version)


async def get_versioned(
    session: AsyncSession | async_scoped_session[Any], model: type[V], key: Any, /, *, version: Any, **options: Any
) -> V:
    """Load an object by its key and expect a version of it.

    Args:
        session: the session of the open unit.
        model: a class with a version mixin.
        key: the primary key, as `AsyncSession.get` takes it.
        version: what the client has seen: see `expect_version`.
        options: passed to `AsyncSession.get_one`: `options`, `with_for_update`, `populate_existing`.

    Raises:
        sqlalchemy.exc.NoResultFound: there is no such row.
        StaleVersionError: it is at another version.
    """
    instance: V = await session.get_one(model, key, **options)
    expect_version(instance, version)
    return instance


def touch(instance: VersionMixin, /) -> None:
    """Give an object a new version with the next flush, though none of its own columns has changed.

    If its columns change in the same flush, that is one change, not two.  A new object has its first version anyway.

    Args:
        instance: an object with a version mixin, in the session of an open unit; it may be expired.

    Raises:
        NoUnitError: the object is in no open unit.
        ReadOnlyError: the unit is read-only.
    """
    transaction, state = _unit_of(instance, "touch()")
    if transaction.read_only:
        raise ReadOnlyError(transaction.read_only_message(f"touch() was called for {describe(instance)}"))
    if state.key is not None:
        versions_of(transaction).touched.add(state)
        flag_dirty(instance)


def _unit_of(instance: object, what: str) -> tuple[Transaction, InstanceState[Any]]:
    if not isinstance(instance, VersionMixin):
        raise TypeError(f"{what} got a {type(instance).__name__}, which has no version; give its model a mixin")
    transaction = transaction_of(object_session(instance))
    if transaction is None or transaction.phase is Phase.ENDED:
        raise NoUnitError(f"{describe(instance)} is in no open unit; call {what} where its session's unit is open")
    return transaction, inspect(instance)
