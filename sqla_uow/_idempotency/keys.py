"""`IdempotencyKeys`: a table of keys, as a program sees it."""

from __future__ import annotations

import functools
import hashlib
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy import MetaData

from sqla_uow._api.current import current_unit
from sqla_uow._databases.failures import Failure, Kind
from sqla_uow._idempotency import claim as claiming
from sqla_uow._idempotency.claim import Claim, Record
from sqla_uow._idempotency.once import once
from sqla_uow._idempotency.purge import purge
from sqla_uow._idempotency.table import MAX_SPACE, Key, make_table
from sqla_uow._transaction.transaction import transaction_of
from sqla_uow.errors import ConflictError, KeyReusedError, ReadOnlyError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy import Table

    from sqla_uow._api.manager import UnitOfWorkManager
    from sqla_uow._transaction.transaction import Transaction
    from sqla_uow._unit.unit import UnitOfWork

__all__ = ["IdempotencyKeys"]

P = ParamSpec("P")
R = TypeVar("R")


class IdempotencyKeys:
    """Keys of work that is to be done once: the record of a key is there if, and only if, the work is.

    It is a row of the unit's own transaction.  If that is rolled back, or its process is killed, the key is free at once.

    Args:
        metadata: of your tables, to which that of the keys is added; make it by a migration as you make the others.
        name: of the table.
        keep: how long a record counts; then the key is as good as new.
        using: whose units `claim`, `result` and `once` work in: the name of a manager, or the manager itself.

    Raises:
        TypeError, ValueError: what was passed cannot work, with what would.
    """

    def __init__(
        self,
        metadata: MetaData,
        /,
        *,
        name: str = "uow_idempotency",
        keep: timedelta = timedelta(days=1),
        using: str | UnitOfWorkManager[Any] = "default",
    ) -> None:
        who = "IdempotencyKeys"
        given: object = metadata
        if not isinstance(given, MetaData):
            raise TypeError(f"{who} got {type(given).__name__}; pass the MetaData of your tables, as Base.metadata")
        check_keep(keep, who)
        self._keep = keep
        self._using = using
        self._table = make_table(name, metadata)

    @property
    def table(self) -> Table:
        """The table, for migrations and reports."""
        return self._table

    @property
    def keep(self) -> timedelta:
        """How long a record counts where nothing else is said."""
        return self._keep

    async def claim(self, space: str, key: str, *, fingerprint: bytes = b"", keep: timedelta | None = None) -> bool:
        """Take a key in the current unit; best as its first statement.

        Within one unit the first claim of a key returns True and each further one False.

        Args:
            space: what the keys are of, as ``"orders"``; keys of two spaces have nothing to do with each other.
            key: the id of a message, say.
            fingerprint: of what the key stands for, a message's body, say; compared where both claims have one.
            keep: how long this record counts; None is that of these keys.

        Returns:
            True: do the work.  False: it was done before, and is committed.

        Raises:
            ConflictError: another transaction has the key and has not ended.  The unit is run again if it has retries left.
            KeyReusedError: the key was used before, with another fingerprint.
            ReadOnlyError: the unit is read-only.
            NoUnitError: no unit is open here.
        """
        _check_text(space, "space", limit=MAX_SPACE)
        _check_text(key, "key")
        digest = hashlib.sha256(fingerprint).digest() if fingerprint else None
        return await self.claim_or_find(Key.of(space, key), fingerprint=digest, keep=keep) is None

    async def result(self, space: str, key: str) -> Any:
        """Return what `once` has kept with a key; None where it has kept nothing.

        Args:
            space: of the key.
            key: as it was given.

        Raises:
            NoUnitError: no unit is open here.
        """
        connection = await current_unit(self._using).session.connection()
        found = await claiming.find(connection, self._table, Key.of(space, key))
        return None if found is None or found.result is None else json.loads(found.result)

    def once(
        self,
        *,
        space: str,
        key: Callable[P, str],
        fingerprint: Callable[P, bytes] | None = None,
        keep: timedelta | None = None,
    ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
        """Run a function once for each key; who calls it again gets what it returned.

        ::

            @transactional(retries=5)
            @keys.once(space="transfer", key=lambda source, target, amount, request: request)
            async def transfer(source: int, target: int, amount: int, request: str) -> dict[str, int]: ...

        It stands below `transactional`.  What the function returns is kept as JSON, and the first caller gets it as all
        others do: read back from that.

        Args:
            space: what the keys are of.
            key: called with the function's arguments, returns the key.
            fingerprint: called likewise, returns what must be the same where the key is.
            keep: how long the result is kept; None is that of these keys.

        Calls raise what `claim` raises, and TypeError or ValueError where what is returned is no JSON.
        """
        _check_text(space, "space", limit=MAX_SPACE)
        if keep is not None:
            check_keep(keep, "once()")

        async def claim(key: Key, digest: bytes | None) -> Record | _Held:
            return await self.claim_or_find(key, fingerprint=digest, keep=keep) or _Held(
                self, current_unit(self._using), key
            )

        return functools.partial(once, claim=claim, space=space, key=key, fingerprint=fingerprint)

    async def purge(self, manager: UnitOfWorkManager[Any], /, *, limit: int = 1000) -> int:
        """Remove the records that have expired; a key needs none of that, the disk does.

        From time to time, and never in a request.  Each batch is a unit, and waits for no row that somebody else has; it is
        as large as can be removed in about 20 ms.

        Args:
            manager: of the database.
            limit: rows in a batch, at most.

        Returns:
            how many were removed.
        """
        return await purge(manager, self._table, limit)

    async def claim_or_find(
        self, key: Key, /, *, fingerprint: bytes | None = None, keep: timedelta | None = None
    ) -> Record | None:
        """Take a key in the current unit, as `claim` does.

        Args:
            key: which.
            fingerprint: SHA-256, 32 bytes, or None.
            keep: how long the record counts; None is that of these keys.

        Returns:
            None: do the work.  Else the record of it.
        """
        unit = current_unit(self._using)
        found = await self.take(unit, key, fingerprint=fingerprint, keep=keep)
        if found is Claim.OURS:
            return None
        if found is Claim.TAKEN:
            raise _in_progress(key, _transaction(unit))
        self.check(key, found, fingerprint)
        return found

    async def take(
        self,
        unit: UnitOfWork[Any],
        key: Key,
        /,
        *,
        fingerprint: bytes | None = None,
        keep: timedelta | None = None,
    ) -> Record | Claim:
        """Take a key in a unit, for who wants to wait outside it: a middleware.

        Args:
            unit: a unit of the table's database.
            key: which.
            fingerprint: SHA-256, 32 bytes, or None.
            keep: how long the record counts; None is that of these keys.

        Returns:
            the record, or what there is instead; behind ``Claim.TAKEN`` the unit has to be rolled back.

        Raises:
            ReadOnlyError: the unit is read-only.
        """
        if unit.read_only:
            raise ReadOnlyError(_transaction(unit).read_only_message("an idempotency key was claimed"))
        span = check_keep(keep, "keep") if keep is not None else self._keep
        connection = await unit.session.connection()
        return await claiming.claim(connection, self._table, key, fingerprint=fingerprint, keep=_microseconds(span))

    async def look(self, manager: UnitOfWorkManager[Any], key: Key, /) -> Record | Claim:
        """Look what became of a key that another transaction had, on a connection for a moment only.

        Args:
            manager: of the database.
            key: which.

        Returns:
            the record; ``Claim.TAKEN``; or ``Claim.OURS`` where whoever claims it next would have it, as far as can be told.
        """
        async with manager.engine.connect() as connection:
            return await claiming.look(connection, self._table, key)

    async def store(self, unit: UnitOfWork[Any], key: Key, kept: Record, /) -> None:
        """Note what came of the work, in the unit that has the key.

        Args:
            unit: the same as for `take`.
            key: likewise.
            kept: replaces what is there.
        """
        await claiming.store(await unit.session.connection(), self._table, key, kept)

    def check(self, key: Key, found: Record, fingerprint: bytes | None, /) -> None:
        """Compare the fingerprint of a record, if it has one, with that of a repetition, if that has one.

        Args:
            key: whose record it is.
            found: the record.
            fingerprint: SHA-256, or None.

        Raises:
            KeyReusedError: they differ.
        """
        if found.fingerprint is not None and fingerprint is not None and found.fingerprint != fingerprint:
            raise KeyReusedError(
                f"a key of {key.space!r} was used before with another fingerprint; use a new key for other work"
            )


class _Held:
    """A key that `once` has, in a unit."""

    def __init__(self, keys: IdempotencyKeys, unit: UnitOfWork[Any], key: Key) -> None:
        self._keys = keys
        self._unit = unit
        self._key = key

    async def store(self, kept: Record, /) -> None:
        await self._keys.store(self._unit, self._key, kept)

    def failed(self, error: BaseException, /) -> None:
        """Doom the unit, or its savepoint, as a transactional function does that is left by an error."""
        if (transaction := transaction_of(self._unit.session.sync_session)) is not None:
            transaction.doom.mark(error)


def check_keep(keep: object, who: str) -> timedelta:
    """Return a span of time that a record can be kept.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(keep, timedelta):
        raise TypeError(f"{who} has keep={keep!r}; use a timedelta")
    if keep <= timedelta(0):
        raise ValueError(f"{who} has keep={keep!r}; use a span longer than nothing")
    return keep


def _check_text(given: object, what: str, *, limit: int | None = None) -> None:
    if not isinstance(given, str):
        raise TypeError(f"an idempotency {what} is a {type(given).__name__}; use a str")
    if not given or (limit is not None and len(given) > limit):
        raise ValueError(
            f"an idempotency {what} has {len(given)} characters; use 1 or more"
            + (f", at most {limit}" if limit else "")
        )


def _microseconds(span: timedelta) -> int:
    return max(1, span // timedelta(microseconds=1))


def _transaction(unit: UnitOfWork[Any]) -> Transaction:
    transaction = transaction_of(unit.session.sync_session)
    assert transaction is not None
    return transaction


def _in_progress(key: Key, transaction: Transaction) -> ConflictError:
    """Return what there is to raise, and have the unit run again for it if it has retries left: as for a row's lock."""
    error = ConflictError(
        f"a key of {key.space!r} is claimed by another transaction that has not ended; try again later",
        reason=Kind.LOCK_TIMEOUT.value,
    )
    transaction.doom.mark(error, failure=Failure(Kind.LOCK_TIMEOUT, None, error), hard=True)
    return error
