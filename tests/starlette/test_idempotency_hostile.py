"""Keys that no client should send: none makes a 500, and none gets another caller's answer.

A few hundred; with ``SQLA_UOW_LONG``, as tox -e long sets it, 10,000.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import MetaData
from starlette.responses import Response

from sqla_uow import UnitOfWorkManager
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow_starlette import Idempotency, exception_handlers
from tests.starlette.client import add, app_of

CASES = 10_000 if os.environ.get("SQLA_UOW_LONG") else 200
pytestmark = [pytest.mark.drivers("sqlite"), pytest.mark.timeout(1200 if CASES > 200 else 90)]

visible = st.binary(max_size=300).map(lambda raw: bytes(0x21 + byte % 94 for byte in raw))
quoted = visible.map(lambda raw: b'"' + raw + b'"')
values = st.one_of(st.binary(max_size=300), visible, quoted, st.sampled_from([b"a", b'"a"', b" a ", b"A", b"a,b"]))
SECRET = b"secret of one response"
NEVER = ("Set-Cookie", "Date", "Server-Timing", "Connection", "Uow-Position", "Transfer-Encoding", "Trailer", "X-Other")
spelled = st.sampled_from([str.lower, str.upper, str.title])


def readable(value):
    """Say whether a value is a key, by the words of the contract rather than by ours."""
    value = value.strip(b" \t")
    if value[:1] == b'"':
        inner, plain, rest = value[1:-1], b"", value[1:-1]
        if len(value) < 2 or value[-1:] != b'"':
            return None
        while rest:
            if rest[:1] == b"\\":
                if rest[1:2] not in (b'"', b"\\") or not rest[1:2]:
                    return None
                plain, rest = plain + rest[1:2], rest[2:]
            elif rest[:1] == b'"':
                return None
            else:
                plain, rest = plain + rest[:1], rest[1:]
        value = plain if inner else b""
    return value if 0 < len(value) <= 255 and all(0x21 <= byte <= 0x7E for byte in value) else None


class Service:
    """An application that counts its runs, and answers each with another body and with what must not be kept."""

    def __init__(self, engine):
        self.metadata = MetaData()
        self.keys = IdempotencyKeys(self.metadata)
        self.runs = 0
        self.headers = {}

        async def endpoint(request):
            self.runs += 1
            await add(1000 + self.runs)
            return Response(b"%d" % self.runs, headers=self.headers, media_type="text/plain")

        def caller(scope):
            return dict(scope["headers"])[b"x-who"].decode("latin-1")

        self.app = app_of(
            UnitOfWorkManager(engine), endpoint, atomic=True, idempotency=Idempotency(self.keys, caller=caller),
            exception_handlers=exception_handlers,
        )  # fmt: skip

    async def send(self, who, lines):
        """Send a request as a server hands it on; return status, headers and body."""
        told = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            told.append(message)

        headers = [(b"x-who", who), *((b"idempotency-key", line) for line in lines)]
        scope = {"type": "http", "method": "POST", "path": "/endpoint", "query_string": b"", "headers": headers}
        await self.app({**scope, "scheme": "http", "root_path": "", "http_version": "1.1"}, receive, send)
        start, *bodies = told
        return start["status"], dict(start["headers"]), b"".join(one.get("body", b"") for one in bodies)


@pytest.fixture
def hostile(driver, databases):
    """Return what runs a check of the service for generated cases."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        db = databases.make(driver, Path(folder))
        service = Service(db.engine())

        async def prepare():
            await db.create_tables()
            async with db.outside() as connection:
                await connection.run_sync(service.metadata.create_all)
                await connection.commit()

        runner.run(prepare())

        def run(check, *strategies):
            @settings(
                max_examples=CASES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
            )  # fmt: skip
            @given(st.tuples(*strategies))
            def case(drawn):
                runner.run(check(service, db, *drawn))

            case()

        yield run
        runner.run(db.dispose())


def test_generated_keys(hostile):
    """What is one key runs once for each caller; what is none is told 400, and does not run."""
    known = {}

    async def check(service, _db, who, lines):
        before = service.runs
        status, headers, body = await service.send(who, lines)
        key = readable(lines[0]) if len(lines) == 1 else None
        if not lines:
            assert (status, service.runs) == (200, before + 1)
        elif key is None:
            assert (status, b"idempotency-key-malformed" in body, service.runs) == (400, True, before)
        elif (who, key) in known:
            assert (status, body, service.runs) == (200, known[who, key], before)
            assert headers[b"idempotent-replayed"] == b"true"
        else:
            assert (status, body, service.runs) == (200, b"%d" % (before + 1), before + 1)
            known[who, key] = body

    hostile(check, st.sampled_from([b"ann", b"bob", b"ann\x00", b"an"]), st.lists(values, max_size=2))
    assert len(known) > CASES / 10


def test_what_is_never_stored(hostile):
    """Whatever way a header is spelled that is of one response only, neither the table nor a repetition has it."""
    used = iter(range(10**9))

    async def check(service, db, names):
        service.headers = {name: SECRET.decode() for name in names}
        key = b"k%d" % next(used)
        assert (await service.send(b"ann", [key]))[0] == 200
        _status, headers, _body = await service.send(b"ann", [key])
        assert headers[b"idempotent-replayed"] == b"true"
        assert SECRET not in headers.values()
        stored = await db.rows("SELECT headers, result FROM uow_idempotency ORDER BY created_at DESC LIMIT 5")
        assert all(SECRET not in (value or b"") for row in stored for value in row)

    one = st.builds(lambda how, name: how(name), spelled, st.sampled_from(NEVER))
    hostile(check, st.lists(one, min_size=1, max_size=4, unique_by=str.lower))
