"""Work that is done once, however often it is asked for: keys of requests and of messages.

::

    keys = IdempotencyKeys(Base.metadata)

    @transactional(retries=5)
    async def handle(message: Message) -> None:
        if not await keys.claim("orders", message.id):
            return  # done before
        ...

* `IdempotencyKeys.claim`: for consumers of a broker, which may deliver a message twice.
* `IdempotencyKeys.once`: a function that returns to who calls it again what it has returned before.
* `sqla_uow_starlette.Idempotency`: the header Idempotency-Key of requests.  It is made of `IdempotencyKeys.take`,
  `IdempotencyKeys.look` and `IdempotencyKeys.store`, which others may use as well.
"""

from sqla_uow._idempotency.claim import Claim, Record
from sqla_uow._idempotency.keys import IdempotencyKeys
from sqla_uow._idempotency.table import Key
from sqla_uow.errors import KeyReusedError

__all__ = ["Claim", "IdempotencyKeys", "Key", "KeyReusedError", "Record"]
