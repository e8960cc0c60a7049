"""The errors of `sqla_uow`, one tree.

::

    UnitOfWorkError
    ├─ NoManagerError            (LookupError)          nothing is activated here
    ├─ NoUnitError               (LookupError)          no unit is open here, or its scope has ended
    ├─ PropagationError          (RuntimeError)         mandatory/durable broken, reuse, exit out of order
    │  └─ IsolationConflictError                        a stronger isolation, or read-write in read-only, asked of an open unit
    ├─ TaskBoundaryError         (RuntimeError)         one unit used by two live tasks, or from a thread
    ├─ SettingMissingError       (LookupError)          a setting that is required has no value here
    ├─ ReadOnlyError                                    a write in a read-only unit
    ├─ LazyLoadError             (InvalidRequestError)  an attribute that is not loaded, where none is loaded lazily
    ├─ RollbackOnlyError                                the body returned normally but its transaction could not commit
    ├─ ConflictError                                    a retryable failure outlived its retries
    │  └─ StaleVersionError      (StaleDataError)       the row changed since it was read
    ├─ TransactionTimeoutError   (TimeoutError)         the deadline passed
    ├─ InstanceReuseError        (RuntimeError)         an object of a failed attempt used again in the next
    ├─ KeyReusedError                                   an idempotency key that was used for something else
    ├─ AmbiguousCommitError                             COMMIT was sent and its answer lost; never retried
    └─ AfterCommitError          (ExceptionGroup)       committed; hooks failed

`NPlusOneWarning` and `LateCommitWarning` (UserWarning) are warnings, not errors.

Every message is one line: *fact with values; remedy*.  What a program may need is an attribute too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm.exc import StaleDataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqla_uow._unit.unit import UnitOfWork

__all__ = [
    "AfterCommitError",
    "AmbiguousCommitError",
    "ConflictError",
    "InstanceReuseError",
    "IsolationConflictError",
    "KeyReusedError",
    "LateCommitWarning",
    "LazyLoadError",
    "NPlusOneWarning",
    "NoManagerError",
    "NoUnitError",
    "PropagationError",
    "ReadOnlyError",
    "RollbackOnlyError",
    "SettingMissingError",
    "StaleVersionError",
    "TaskBoundaryError",
    "TransactionTimeoutError",
    "UnitOfWorkError",
]


class UnitOfWorkError(Exception):
    """Root of every error that `sqla_uow` raises itself."""


class NoManagerError(UnitOfWorkError, LookupError):
    """No manager of that name is activated in this context."""


class NoUnitError(UnitOfWorkError, LookupError):
    """No unit of work is open in this context, or the one that was inherited has ended."""


class PropagationError(UnitOfWorkError, RuntimeError):
    """A unit was opened, joined, used or left in a way that its propagation forbids."""


class IsolationConflictError(PropagationError):
    """A call asked an open unit for more than it was begun with: a stronger isolation, or read-write."""


class TaskBoundaryError(UnitOfWorkError, RuntimeError):
    """Two live tasks, or another thread, used one unit of work.  The unit is doomed."""


class SettingMissingError(UnitOfWorkError, LookupError):
    """A setting, or a role, that every transaction needs has no value here; nothing was begun.

    Attributes:
        name: of the setting; ``"role"`` for the role.
    """

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class ReadOnlyError(UnitOfWorkError):
    """A read-only unit, or the read session of a scope, was asked to write."""


class LazyLoadError(UnitOfWorkError, InvalidRequestError):
    """An attribute is not loaded, and its unit refuses lazy loads, or asyncio cannot wait for the database there.

    It is raised before anything is sent, and the unit can go on.  If the manager allows lazy loads, the driver finds
    out instead; then the statement that it could not send dooms the unit.

    Attributes:
        attribute: class and name, such as ``"User.posts"``.
        option: the loader option that would have loaded it, such as ``"selectinload(User.posts)"``; None if only a
            refresh helps.
    """

    def __init__(self, message: str, *, attribute: str = "", option: str | None = None) -> None:
        super().__init__(message)
        self.attribute = attribute
        self.option = option


class NPlusOneWarning(UserWarning):
    """One unit sent the same SELECT again and again, where one statement could have read everything."""


class LateCommitWarning(UserWarning):
    """A response starts while a unit of its request is open: if its COMMIT fails later, the client is not told."""


class RollbackOnlyError(UnitOfWorkError):
    """The body returned normally, but its transaction could only be rolled back; or SQL was sent after that was known.

    `__cause__` is the first error that doomed the unit, if there was one.
    """


class ConflictError(UnitOfWorkError):
    """A retryable failure outlived its retries.

    Attributes:
        attempts: how many times the body ran.
        elapsed: seconds since the first attempt began, waits included.
        reason: what the last failure was: ``"conflict"``, ``"lock timeout"``, ``"stale version"``,
            ``"not started"``, ``"lost connection"``, ``"stale plan"`` or ``"retry_on"``.
        code: the database's own code for it (``"40001"``, ``"1213"``, ``"SQLITE_BUSY"``), or None.
    """

    def __init__(
        self,
        message: str,
        *,
        attempts: int = 1,
        elapsed: float = 0.0,
        reason: str = "conflict",
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.elapsed = elapsed
        self.reason = reason
        self.code = code


class StaleVersionError(ConflictError, StaleDataError):
    """The row changed, or vanished, since it was read; the version column says so.

    If the unit expected a version of the object (`sqla_uow.mixins.expect_version`), the error is never retried, and it
    names the object.

    Attributes:
        model: the object's class; None if no row was found that has changed.
        key: its primary key, a tuple.
        expected: the version that the client, or the unit, had seen.
        found: the version that the row had afterwards; None if the row is gone.
    """

    def __init__(
        self,
        message: str,
        *,
        model: type[Any] | None = None,
        key: tuple[Any, ...] | None = None,
        expected: Any = None,
        found: Any = None,
        attempts: int = 1,
        elapsed: float = 0.0,
        reason: str = "stale version",
        code: str | None = None,
    ) -> None:
        super().__init__(message, attempts=attempts, elapsed=elapsed, reason=reason, code=code)
        self.model = model
        self.key = key
        self.expected = expected
        self.found = found


class TransactionTimeoutError(UnitOfWorkError, TimeoutError):
    """The deadline over all attempts and waits passed, or the next wait would have crossed it.

    Attributes:
        attempts: how many times the body ran or began to run.
        elapsed: seconds since the first attempt began.
        timeout: the seconds that the call was given.
    """

    def __init__(self, message: str, *, attempts: int = 1, elapsed: float = 0.0, timeout: float = 0.0) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.elapsed = elapsed
        self.timeout = timeout


class InstanceReuseError(UnitOfWorkError, RuntimeError):
    """An ORM object that a failed attempt attached or loaded was put into the next attempt's session.

    It is also raised if a failed attempt has used up an argument that the next one needs: a generator, or a file that
    cannot be rewound.
    """


class KeyReusedError(UnitOfWorkError):
    """An idempotency key was used before, for other work than now: its fingerprint is another."""


class AmbiguousCommitError(UnitOfWorkError):
    """COMMIT was sent and its answer is unknown: the transaction is either wholly there or wholly absent.

    `sqla_uow` never retries it: a retry could apply the work twice.  `__cause__` is the error that came instead of the
    answer.

    Attributes:
        unit: the unit of work; its status is ``Status.AMBIGUOUS``.
    """

    def __init__(self, message: str, *, unit: UnitOfWork[Any] | None = None) -> None:
        super().__init__(message)
        self.unit = unit


class AfterCommitError(UnitOfWorkError, ExceptionGroup[Exception]):
    """The transaction *is committed*; one or more of its `after_commit` hooks failed."""

    def __new__(cls, message: str, exceptions: Sequence[Exception], /) -> Self:
        """Make a group of the hooks' exceptions."""
        return super().__new__(cls, message, exceptions)

    # typeshed lets derive() be called with any BaseException; the group of a split has only what was in this one.
    def derive(self, excs: Sequence[Exception], /) -> AfterCommitError:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a group of the same kind, as `ExceptionGroup.split` and `subgroup` ask for."""
        return AfterCommitError(self.message, excs)
