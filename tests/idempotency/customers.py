"""Who asks `tests.idempotency.shop`, and asks again until there is an answer; and what there is to be found afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from sqlalchemy import text

ROOT = Path(__file__).parents[2]
PATIENCE = 10
"""Seconds until a request is given up by who sent it."""
SURELY = 60
"""Seconds until a key that has no answer is stuck."""


class Shop:
    """The processes of the application; a context manager that starts and ends them.

    Args:
        url: of the database.
        options: of their engines.
        processes: how many.
        wait: seconds that a repetition waits.
    """

    def __init__(self, url, *, options, processes=2, wait=1.0):
        self._settings = {"url": url, "options": options, "wait": wait}
        self._listeners = [socket.create_server(("127.0.0.1", 0), backlog=200) for _ in range(processes)]
        self.ports = [listener.getsockname()[1] for listener in self._listeners]
        self.pids = {}
        self.births = 0
        self._ready = threading.Event()

    def __enter__(self):
        sockets = [listener.fileno() for listener in self._listeners]
        command = [sys.executable, "-m", "tests.idempotency.shop", json.dumps({**self._settings, "sockets": sockets})]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, pass_fds=sockets, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(30)
        return self

    def _read(self):
        for line in self._process.stdout:
            port, pid = map(int, line.split())
            self.pids[port] = pid
            self.births += 1
            if self.births == len(self.ports):
                self._ready.set()

    def signal(self, port, number):
        """Send a signal to the process that listens on a port, if there is one at the moment."""
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(self.pids[port], number)

    def __exit__(self, *_error):
        for port in self.ports:
            self.signal(port, signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join(10)
        self._process.stdout.close()
        for listener in self._listeners:
            listener.close()


async def ask(port, key, *, seconds=0.0, leave=False):
    """Send a request; return what a client may compare of its answer, None if there is none.

    Args:
        port: of a process.
        key: of the request.
        seconds: that the work takes.
        leave: before the answer.
    """
    head = (
        f"POST /work HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: {key}\r\nSeconds: {seconds}\r\nContent-Length: 0\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode())
                await writer.drain()
                if leave:
                    return None
                return _read(await reader.read())
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None


def _read(answer):
    head, found, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    if not found or len(body) != int(headers["content-length"]):
        return None
    return int(first.split()[1]), headers.get("content-type"), headers.get("location"), body


class Customers:
    """Clients at work.

    Args:
        shop: whom they ask.
        seed: of what they choose.
    """

    ALLOWED = (
        (409, "idempotency-key-in-progress"), (500, "ambiguous-commit"), (503, "conflict"), (503, "database-busy"),
        (503, "database-unavailable"),
    )  # fmt: skip

    def __init__(self, shop, seed):
        self.shop = shop
        self.answers = {}
        self.told = Counter()
        self.wrong = []
        self.repeated = 0
        self._chance = random.Random(seed)
        self._over = False

    @contextlib.asynccontextmanager
    async def asking(self, number):
        """Let so many of them ask while the block does harm; at its end each gets its answer."""
        tasks = [asyncio.create_task(self._work(one)) for one in range(number)]
        try:
            yield
        finally:
            self._over = True
            done, late = await asyncio.wait(tasks, timeout=SURELY)
            for task in late:
                task.cancel()
        await asyncio.gather(*done)
        assert not late, f"{len(late)} keys have no answer after {SURELY} s: {self.told}"

    async def _work(self, number):
        count = 0
        while not self._over:
            count += 1
            await self.until_answered(f"{number}-{count}", seconds=self._chance.choice([0, 0, 0.02]))

    async def until_answered(self, key, **options):
        """Send a request again and again; now and then twice at once, now and then without waiting for its answer."""
        while key not in self.answers:
            if self._chance.random() < 0.1:
                await self._once(key, leave=True, **options)
            twice = 2 if self._chance.random() < 0.2 else 1
            await asyncio.gather(*(self._once(key, **options) for _ in range(twice)))
            self.repeated += 1
            if key not in self.answers:
                await asyncio.sleep(self._chance.uniform(0.01, 0.1))

    async def _once(self, key, **options):
        answer = await ask(self._chance.choice(self.shop.ports), key, **options)
        if answer is None:
            self.told[None] += 1
            return
        status, *_headers, body = answer
        code = "" if status == 201 else json.loads(body).get("code") if body[:1] == b"{" else body.decode()
        self.told[status, code] += 1
        if status == 201:
            if self.answers.setdefault(key, answer) != answer:
                self.wrong.append((key, self.answers[key], answer))
        elif (status, code) not in self.ALLOWED:
            self.wrong.append((key, answer))

    async def check(self, engine):
        """Ask for every key once more, and look what there is: each was worked once, and is answered by that."""
        waiting = list(self.answers)

        async def again():
            while waiting:
                key = waiting.pop()
                answer = await ask(self._chance.choice(self.shop.ports), key)
                if answer is None or answer[0] != 201:
                    waiting.append(key)
                    await asyncio.sleep(0.05)
                elif answer != self.answers[key]:
                    self.wrong.append((key, self.answers[key], answer))

        async with asyncio.timeout(SURELY):
            await asyncio.gather(*(again() for _ in range(10)))
        async with engine.connect() as connection:
            rows = [tuple(row) for row in await connection.execute(text("SELECT request, token FROM work"))]
            counted = await connection.scalar(text("SELECT sum(n) FROM counter"))
        done = {key: json.loads(answer[-1])["token"] for key, answer in self.answers.items()}
        assert not self.wrong, self.wrong[:3]
        assert dict(rows) == done, dict(set(rows) ^ set(done.items()))
        assert len(rows) == len(done) == counted, (len(rows), len(done), counted)


async def every_second(seconds, *harms):
    """Do one harm after the other, one each second."""
    end, turn = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        began = time.monotonic()
        await asyncio.to_thread(harms[turn % len(harms)])
        turn += 1
        await asyncio.sleep(max(0.0, began + 1 - time.monotonic()))
    return turn
