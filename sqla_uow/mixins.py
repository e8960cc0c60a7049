"""Version columns that nothing in the ORM bypasses.

::

    class Order(Versioned, Base): ...

    @transactional
    async def rename(order_id: int, name: str, seen: int) -> None:
        order = await get_versioned(current_session(), Order, order_id, version=seen)
        order.name = name

* `Versioned`, `VersionedByUUID`, `VersionedByTimestamp` and `VersionedByXmin` are mixins for models.
* `expect_version` and `get_versioned` hold a unit to the version that a client has seen.
* An ORM ``update()`` gives each row that it changes a new version, in the same statement; `next_version` is for
  upserts.
* `touch` counts a change that is in none of the object's columns; ``__version_follows__ = ("lines",)`` on a model does
  so for each change of an object of that relationship.
"""

import sqla_uow._versions.events  # pyright: ignore[reportUnusedImport]  # for its listeners
import sqla_uow._versions.follows  # noqa: F401  # pyright: ignore[reportUnusedImport]  # for its listeners too
from sqla_uow._versions.bulk import next_version
from sqla_uow._versions.expect import expect_version, get_versioned, touch
from sqla_uow._versions.mapping import Versioned, VersionedByTimestamp, VersionedByUUID, VersionedByXmin
from sqla_uow.errors import StaleVersionError

__all__ = [
    "StaleVersionError",
    "Versioned",
    "VersionedByTimestamp",
    "VersionedByUUID",
    "VersionedByXmin",
    "expect_version",
    "get_versioned",
    "next_version",
    "touch",
]
