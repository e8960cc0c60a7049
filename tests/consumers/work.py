"""What a message asks for: a row, and the record of its id in the same transaction."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_uow import current_session, transactional
from sqla_uow.idempotency import IdempotencyKeys


class Base(DeclarativeBase):
    pass


class Worked(Base):
    """Written once for each message; nothing but the claim sees to that."""

    __tablename__ = "worked"
    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[str] = mapped_column(String(100))
    amount: Mapped[int]


keys = IdempotencyKeys(Base.metadata)


async def nothing():
    """Happen between the claim and the work."""


def working(inside=nothing, **options):
    """Return the work: a function of the id and the payload of a message, that says whether it did something.

    Args:
        inside: called in its unit, when the message is claimed.
        options: of its unit.
    """

    @transactional(**options)
    async def work(name, payload):
        if not await keys.claim("deposits", name, fingerprint=payload):
            return False
        await inside()
        current_session().add(Worked(message=name, amount=int(payload)))
        return True

    return work
