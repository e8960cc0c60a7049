"""What a statement does, by its text: it reads, writes, ends the transaction, or makes MariaDB commit.

Needed for text, and for what is sent past SQLAlchemy: of the rest SQLAlchemy itself knows it.
"""

from __future__ import annotations

import enum
import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqla_uow._databases.system import System

__all__ = ["CONTROL", "OPENING", "SOMETHING", "Rows", "does", "ends_in_its_tail", "ends_raw", "rows_of", "selects"]

# SQLite's BEGIN is ours, or the user's own recipe.  MariaDB's BEGIN commits what is open, except in BEGIN NOT ATOMIC blocks.
_ENDS = re.compile(
    r"(?:COMMIT|END|ABORT|START\s+TRANSACTION|BEGIN(?!\s+NOT\b)|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE,
)


# Before these MariaDB commits what is open: https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
_COMMITS_FIRST = re.compile(
    r"(?:ALTER|ANALYZE\s+(?:\w+\s+)?TABLE|CACHE\s+INDEX|CHANGE|CHECK\s+TABLE|CREATE|DROP|FLUSH|GRANT|INSTALL|LOAD\s+INDEX|"
    r"OPTIMIZE|RENAME|REPAIR|RESET|REVOKE|SET\s+PASSWORD|SHUTDOWN|START|STOP|TRUNCATE|UNINSTALL)\b",
    re.IGNORECASE,
)
# These also leave something on the connection when the unit has ended.
_OUTLIVES = re.compile(
    r"(?:LOCK\s+TABLES?|UNLOCK\s+TABLES?|XA|SET\s+(?:SESSION\s+|LOCAL\s+|@@(?:SESSION\.|LOCAL\.)?)?AUTOCOMMIT)\b",
    re.IGNORECASE,
)
_NO_ROWS = re.compile(
    r"(?:(?:CREATE|DROP)\s+(?:OR\s+REPLACE\s+)?TEMPORARY|DESC|DESCRIBE|DROP\s+PREPARE|EXPLAIN|SET(?!\s+(?:STATEMENT|PASSWORD)\b)|USE)\b",
    re.IGNORECASE,
)


class Rows(enum.Enum):
    """What a statement that is not a query does to the rows that a unit on MariaDB has written."""

    OUTLIVES = "commits them, and leaves something behind"
    COMMITS = "commits them"
    NONE = "nothing"
    WRITES = "may write others"


@functools.lru_cache(maxsize=512)
def rows_of(opening: str) -> Rows:
    if _OUTLIVES.match(opening) is not None:
        return Rows.OUTLIVES
    if _NO_ROWS.match(opening) is not None:
        return Rows.NONE
    return Rows.WRITES if _COMMITS_FIRST.match(opening) is None else Rows.COMMITS


_READING = ("SELECT", "BEGIN", "PRAGMA", "SET TRANS", "SHOW", "SAVEPOINT", "RELEASE", "ROLLBACK")
OPENING = 64  # characters: as much as the longest of the above needs, and little enough to be remembered


class Does(enum.Enum):
    """What a statement does, by its opening."""

    CONTROL = "ends the transaction, or begins another"
    READING = "reads"
    SOMETHING = "writes, or nobody can tell"


CONTROL, SOMETHING = Does.CONTROL, Does.SOMETHING  # looking a member up by its name runs Python code on 3.11


@functools.lru_cache(maxsize=512)
def does(opening: str) -> Does:
    if _ENDS.match(opening) is not None:
        return Does.CONTROL
    return Does.READING if opening[:9].upper().startswith(_READING) else Does.SOMETHING


def selects(context: Any) -> bool:
    """Say whether SQLAlchemy knows that the statement is a SELECT, even if it begins with WITH."""
    return (
        context is not None and context.compiled is not None and getattr(context.compiled.statement, "is_select", False)
    )


_HAS_BODY = re.compile(r"(?:CREATE|ALTER|DO|BEGIN\s+NOT)\b", re.IGNORECASE)  # the END in these is their own


def ends_raw(system: System, text: str) -> bool:
    """Say whether a text sent past SQLAlchemy ends the transaction; if it also begins another, nothing else shows it."""
    if system.quoted is None or not _MAY_END.search(text):
        return False
    parts = system.quoted.sub(" ", text).split(";")
    if _HAS_BODY.match(parts[0].lstrip()) is not None:
        return False
    openings = [part.lstrip()[:OPENING] for part in parts]
    return any(does(one) is CONTROL and not one.upper().startswith(system.harmless_inside) for one in openings)


_MAY_END = re.compile(r"\b(?:COMMIT|END|ABORT|ROLLBACK|BEGIN|START)\b", re.IGNORECASE)


def ends_in_its_tail(statement: str) -> bool:
    """Say whether a text of several statements may end the transaction after the first of them."""
    for part in statement.split(";")[1:]:
        opening = part.lstrip()[:OPENING]
        if does(opening) is CONTROL or rows_of(opening) in (Rows.OUTLIVES, Rows.COMMITS):
            return True
    return False
