"""What a unit's failure is made of, so that one can be compared with another."""

from __future__ import annotations

from sqla_uow import errors
from sqla_uow._databases.failures import classify


class Failed:
    """Everything that code can tell one failure from another by."""

    def __init__(self):
        self.seen = {}

    def __eq__(self, other):
        return self.seen == other.seen

    def __repr__(self):
        return f"{self.seen}"

    __hash__ = None

    @classmethod
    async def of(cls, manager, body, **options):
        """Run a body in a unit, and describe what comes out of it."""
        self, unit = cls(), None
        try:
            async with manager.begin(**options) as unit:
                try:
                    await body(unit.session)
                except BaseException:
                    self.seen["in"] = "body"
                    raise
                self.seen["in"] = "COMMIT"
        except errors.UnitOfWorkError as error:
            cause = error.__cause__
            driver = getattr(cause, "orig", cause)
            failure = classify(cause, connecting=unit._transaction.connect_failure is not None)
            self.seen |= {
                "raised": type(error),
                "reason": getattr(error, "reason", None),
                "code": getattr(error, "code", None),
                "class": type(cause),
                "driver's class": type(driver),
                "kind": failure.kind,
                "driver's code": failure.code,
                "invalidated": getattr(cause, "connection_invalidated", None),
                "status": unit.status,
            }
        return self
