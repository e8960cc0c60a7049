"""The load: a client that sends many requests at once, and what it is told of each."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from examples.bank.runner.schema import CLERKS
from examples.bank.runner.tally import FUNCTIONS, Row, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Call", "calls", "client_of", "run"]

_SHARES = (45, 15, 20, 20)
_COMING = 0.5  # of the calls about clerks: one comes; in the others one leaves
_MOST = 50_00  # cents; an account begins with 200.00
_PAUSE = 0.05  # s, before a call without an answer is made again
_TIMEOUT = 60  # s; a call of many that fight for one row waits its turn


class Call(NamedTuple):
    """Something to ask of the bank, and its arguments."""

    function: str
    arguments: dict[str, Any]


def calls(number: int, *, accounts: int, seed: int) -> Iterator[Call]:
    """Draw the calls of one run; the same seed draws the same ones."""
    rng = random.Random(seed)  # noqa: S311  # a load, no secret
    for n, function in enumerate(rng.choices(FUNCTIONS, _SHARES, k=number)):
        source, target = rng.sample(range(1, accounts + 1), 2)
        money = {"amount": rng.randint(1, _MOST), "reference": f"load {n}"}
        arguments: dict[str, dict[str, Any]] = {
            "transfer": {"source": source, "target": target, **money},
            "deposit": {"number": target, **money},
            "edit": {"number": target},
            "set_duty": {"number": rng.randint(1, CLERKS), "on_duty": rng.random() < _COMING},
        }
        yield Call(function, arguments[function])


def client_of(address: str, workers: int) -> httpx.AsyncClient:
    """Make the client; it goes straight to the address, whatever proxy the environment names."""
    limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
    return httpx.AsyncClient(base_url=address, limits=limits, timeout=_TIMEOUT, trust_env=False)


async def run(
    client: httpx.AsyncClient, todo: Iterator[Call], tally: Tally, *, workers: int, done: Callable[[], object]
) -> None:
    """Make the calls, `workers` at a time; when this is cancelled, so are the calls in flight, and then it returns.

    Args:
        client: of the bank.
        todo: the calls, shared by the workers.
        tally: where they are counted.
        workers: how many call at once.
        done: called after each call.
    """
    tasks = [asyncio.create_task(_work(client, todo, tally, done), name=f"worker {n}") for n in range(workers)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:  # what no call should raise
        if isinstance(result, Exception):
            raise result


async def _work(client: httpx.AsyncClient, todo: Iterator[Call], tally: Tally, done: Callable[[], object]) -> None:
    for call in todo:
        await _make(client, call, tally)
        done()


async def _make(client: httpx.AsyncClient, call: Call, tally: Tally) -> None:
    row = tally.rows[call.function]
    row.calls += 1
    begun = time.perf_counter()
    try:
        answer = await _ASKS[call.function](client, row, **call.arguments)
    except httpx.HTTPError as error:
        row.failed[type(error).__name__] += 1
        tally.never_answered(call.function)
    except asyncio.CancelledError:
        row.cancelled += 1
        tally.never_answered(call.function)
        raise
    else:
        row.count(answer.status_code, time.perf_counter() - begun)
        tally.answered(call.function, call.arguments, answer)


async def _transfer(client: httpx.AsyncClient, _row: Row, **order: Any) -> httpx.Response:
    """Send an order until there is an answer, each time with the same key, so that it is done once."""
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    until = time.monotonic() + _TIMEOUT
    while True:
        try:
            answer = await client.post("/transfers", json=order, headers=headers)
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
        else:
            if "retry-after" not in answer.headers or time.monotonic() > until:
                return answer
        await asyncio.sleep(_PAUSE)


async def _deposit(client: httpx.AsyncClient, _row: Row, number: int, **order: Any) -> httpx.Response:
    return await client.post(f"/accounts/{number}/deposits", json=order)


async def _edit(client: httpx.AsyncClient, row: Row, number: int) -> httpx.Response:
    """Raise an account's credit by a cent: read it, and write it back with the version that was read.

    No transaction of a database spans these two requests, only the version does.
    """
    path = f"/accounts/{number}"
    while True:
        read = await client.get(path)
        if read.status_code != httpx.codes.OK:
            return read
        seen = read.json()
        wish = {"owner": seen["owner"], "credit": seen["credit"] + 1}
        answer = await client.put(path, json=wish, headers={"if-match": read.headers.get("etag", "*")})
        if answer.status_code != httpx.codes.PRECONDITION_FAILED:
            return answer
        row.outrun += 1  # somebody was first, so somebody got on: this ends


async def _set_duty(client: httpx.AsyncClient, _row: Row, number: int, **wish: Any) -> httpx.Response:
    return await client.put(f"/clerks/{number}", json=wish)


_ASKS: dict[str, Callable[..., Any]] = {
    "transfer": _transfer,
    "deposit": _deposit,
    "edit": _edit,
    "set_duty": _set_duty,
}
