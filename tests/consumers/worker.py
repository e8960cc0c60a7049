"""Consumers in processes of their own, to be killed.

`python -m tests.consumers.worker` forks one for each line on its stdin, which takes a hundredth of the time of starting an
interpreter, and answers with its process id.  The line is JSON, the arguments of `consume`, with a path for `said`.  All of them end with the stdin.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_uow import UnitOfWorkManager, current_session, transactional
from tests.consumers.clients import CLIENTS
from tests.consumers.work import Worked, keys, working

POOL = 5
PAUSE = 0.005  # s at most, on each side of the COMMIT, where a kill is to hit
LOST = 0.01  # of all acknowledgements


async def pause():
    """Take a while."""
    await asyncio.sleep(random.random() * PAUSE)


@transactional(retries=20)
async def claim(name, payload):
    """Claim without the work."""
    return await keys.claim("deposits", name, fingerprint=payload)


@transactional(retries=20)
async def work_anyway(name, payload):
    """Work without the claim."""
    await pause()
    current_session().add(Worked(message=name, amount=int(payload)))


async def apart(name, payload):
    """Do in two transactions what belongs into one."""
    if not await claim(name, payload):
        return False
    await work_anyway(name, payload)
    return True


async def consume(*, client, broker, queue, database, how, said):
    """Consume until killed.

    Args:
        client: one of `CLIENTS`.
        broker: its URL.
        queue: of the messages.
        database: its URL.
        how: "together", as it should be; "hold": go no further after the commit, so that the message is not acknowledged;
            "apart": claim in a transaction of its own before the work, which is wrong.
        said: an open file, for a line on each delivery: the id, and what the work said; "lost" if it then fails to acknowledge.
    """
    engine = create_async_engine(database, pool_size=POOL, max_overflow=0)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _wait_for_others)
    work = apart if how == "apart" else working(pause, retries=20)

    async def told(name, payload):
        print(name, await work(name, payload), file=said)
        if how == "hold":
            await asyncio.Event().wait()
        await pause()
        if random.random() < LOST:
            print(name, "lost", file=said)
            raise ConnectionError

    with UnitOfWorkManager(engine).activate():
        await CLIENTS[client](broker, queue, told)


def _wait_for_others(connection, _record):
    connection.execute("PRAGMA busy_timeout=20000")


def main():
    """Fork until the end of stdin."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that who was killed is gone, and no zombie
    for line in sys.stdin:
        if not (pid := os.fork()):
            random.seed()
            arguments = json.loads(line)
            with Path(arguments["said"]).open("a", buffering=1) as said:
                asyncio.run(consume(**{**arguments, "said": said}))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
