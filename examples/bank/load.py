"""The load: who calls what, and what comes of each call."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from examples.bank.tally import FUNCTIONS, Tally, name_of
from sqla_uow.errors import AmbiguousCommitError, ConflictError, UnitOfWorkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SHIFTS", "Call", "calls", "run"]

SHIFTS = 4
"""Two doctors each: few, so that both often ask at once."""
_SHARES = (60, 20, 20)
_MOST = 50_00  # cents; an account begins with 1,000.00


class Call(NamedTuple):
    """A function of the bank and its arguments."""

    function: str
    arguments: tuple[Any, ...]


def calls(number: int, *, accounts: int, seed: int, acknowledge: Callable[[int], object]) -> Iterator[Call]:
    """Draw the calls of one run; the same seed draws the same ones."""
    rng = random.Random(seed)  # noqa: S311  # a load, no secret
    for function in rng.choices(FUNCTIONS, _SHARES, k=number):
        if function == "swap_on_call":
            yield Call(function, (rng.randrange(2 * SHIFTS),))
            continue
        source, target = rng.sample(range(accounts), 2)
        amount = rng.randint(1, _MOST)
        yield Call(function, (source, target, amount) if function == "transfer" else (source, amount, acknowledge))


async def run(bank: Any, todo: Iterator[Call], tally: Tally, *, workers: int, done: Callable[[], object]) -> None:
    """Make the calls, `workers` at a time; when this is cancelled, so are the calls in flight, and then it returns.

    Args:
        bank: has the functions.
        todo: the calls, shared by the workers.
        tally: where they are counted.
        workers: how many call at once.
        done: called after each call.
    """
    tasks = [asyncio.create_task(_work(bank, todo, tally, done), name=f"worker {n}") for n in range(workers)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:  # what no call of a bank should raise
        if isinstance(result, Exception):
            raise result


async def _work(bank: Any, todo: Iterator[Call], tally: Tally, done: Callable[[], object]) -> None:
    for call in todo:
        await _make(bank, call, tally)
        done()


async def _make(bank: Any, call: Call, tally: Tally) -> None:
    row = tally.rows[call.function]
    row.calls += 1
    begun = time.perf_counter()
    try:
        moved = await getattr(bank, call.function)(*call.arguments)
    except ConflictError as error:
        row.gave_up += 1
        row.conflicts[error.reason if error.code is None else f"{error.reason} {error.code}"] += 1
    except AmbiguousCommitError as error:
        row.failed[name_of(error)] += 1
        tally.unknown += call.arguments[1] if call.function == "deposit" else 0
    except (SQLAlchemyError, UnitOfWorkError, OSError) as error:  # asyncpg raises plain OSErrors at connect
        row.failed[name_of(error)] += 1
    except asyncio.CancelledError:
        row.cancelled += 1
        raise
    else:
        row.seconds.append(time.perf_counter() - begun)
        row.commits += 1
        row.refused += not moved
