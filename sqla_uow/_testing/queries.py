"""How many statements a block sends."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import event

from sqla_uow._testing.statements import engine_of, is_work

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqla_uow._testing.statements import Bind

__all__ = ["Queries", "assert_max_num_queries", "assert_num_queries", "count_queries"]


class Queries:
    """The statements that were sent, in order.

    Attributes:
        statements: the text of each statement, without its parameters.
    """

    def __init__(self) -> None:
        self.statements: list[str] = []

    @property
    def count(self) -> int:
        """How many statements there were; one that was sent for many rows counts once."""
        return len(self.statements)

    def __repr__(self) -> str:
        return f"<Queries: {self.count}>"


@contextmanager
def count_queries(bind: Bind, /) -> Generator[Queries]:
    """Count the statements that any task sends to a database in the block.

    What a unit sends for itself is left out, since it differs from database to database: BEGIN, SAVEPOINT, COMMIT,
    isolation levels, deadlines.

    Args:
        bind: the engine, or a manager over it.

    Raises:
        TypeError: `bind` is neither an engine nor a manager.
    """
    engine, queries = engine_of(bind, "count_queries()"), Queries()

    def sent(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if is_work(statement):
            queries.statements.append(statement)

    event.listen(engine, "before_cursor_execute", sent)
    try:
        yield queries
    finally:
        event.remove(engine, "before_cursor_execute", sent)


@contextmanager
def assert_num_queries(bind: Bind, number: int, /) -> Generator[Queries]:
    """Fail unless the block sends exactly `number` statements; see `count_queries`.

    Args:
        bind: the engine, or a manager over it.
        number: how many statements.

    Raises:
        AssertionError: it sent fewer or more; the message has their text.
        ValueError: `number` is not a whole number from 0.
    """
    _check(number, "assert_num_queries()")
    with count_queries(bind) as queries:
        yield queries
    if queries.count != number:
        raise AssertionError(_sent(queries, f"not {number}"))


@contextmanager
def assert_max_num_queries(bind: Bind, number: int, /) -> Generator[Queries]:
    """Fail if the block sends more than `number` statements; see `count_queries`.

    Args:
        bind: the engine, or a manager over it.
        number: how many statements.

    Raises:
        AssertionError: it sent more; the message has their text.
        ValueError: `number` is not a whole number from 0.
    """
    _check(number, "assert_max_num_queries()")
    with count_queries(bind) as queries:
        yield queries
    if queries.count > number:
        raise AssertionError(_sent(queries, f"more than {number}"))


def _check(number: object, who: str) -> None:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{who} got {number!r}; use a whole number, from 0")


def _sent(queries: Queries, wanted: str) -> str:
    # With the SQL, on lines of its own: for a developer's terminal, and what they look for.
    lines = [f"{number}. {' '.join(text.split())}" for number, text in enumerate(queries.statements, 1)]
    sent = "1 query was" if queries.count == 1 else f"{queries.count} queries were"
    return "\n".join([f"{sent} sent, {wanted}", *lines])
