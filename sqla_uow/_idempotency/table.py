"""The table of keys, and which row a key has."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Column, DateTime, Index, LargeBinary, SmallInteger, String, Table
from sqlalchemy.dialects import mysql

if TYPE_CHECKING:
    from sqlalchemy import MetaData

__all__ = ["MAX_SPACE", "Key", "make_table"]

MAX_SPACE = 100
"""Characters."""
_DIGEST = 32


class Key(NamedTuple):
    """Which row is meant.

    Attributes:
        space: of the key, for people who look into the table.
        digest: the row's primary key.
    """

    space: str
    digest: bytes

    @classmethod
    def of(cls, space: str, /, *parts: str) -> Key:
        """Return the key that has these parts.

        Each goes in with its length, so that no two keys share a digest; and no collation makes "A" equal to "a".

        Args:
            space: what the key is of.
            parts: the key, and what it belongs to: who has sent it, say.
        """
        digest = hashlib.sha256()
        for part in (space, *parts):
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big"))
            digest.update(encoded)
        return cls(space, digest.digest())


def _binary() -> LargeBinary:
    return LargeBinary(_DIGEST).with_variant(mysql.BINARY(_DIGEST), "mysql", "mariadb")


def _time() -> DateTime:
    return DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def make_table(name: str, metadata: MetaData) -> Table:
    """Add the table to a `MetaData`.

    A row whose `status` is NULL is of a message, or of a function.  Its `headers` is then the mark of the claim that made it:
    where a claim cannot tell an INSERT from a row that it has found, it sees by its own mark that the key is its.
    """
    return Table(
        name,
        metadata,
        Column("digest", _binary(), primary_key=True),
        Column("space", String(MAX_SPACE), nullable=False),
        Column("fingerprint", _binary()),
        Column("status", SmallInteger),
        Column("headers", LargeBinary),
        # On MariaDB a BLOB ends at 64 KiB
        Column("result", LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")),
        Column("created_at", _time(), nullable=False),
        Column("expires_at", _time(), nullable=False),
        Index(f"ix_{name}_expires_at", "expires_at"),
    )
