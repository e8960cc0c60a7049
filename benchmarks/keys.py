"""What an idempotency key costs a request: a new one, one that is sent again, among a million others; and what a purge holds.

A request is one INSERT, in process, as a server would call the application.  The baseline is the same middleware without a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from benchmarks import interleaving
from benchmarks.interleaving import Figure, compare, left_out
from sqla_uow import UnitOfWorkManager, current_session
from sqla_uow.idempotency import IdempotencyKeys
from sqla_uow_starlette import Idempotency, UnitOfWorkMiddleware

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message

__all__ = ["report"]

CALLS = 20
MANY = 1_000_000
EXPIRED = 20_000
_INSERT = text("INSERT INTO work (note) VALUES ('done')")
_WORK = {
    "postgresql": "CREATE TABLE work (id BIGSERIAL PRIMARY KEY, note VARCHAR(10))",
    "mysql": "CREATE TABLE work (id BIGINT AUTO_INCREMENT PRIMARY KEY, note VARCHAR(10))",
    "sqlite": "CREATE TABLE work (id INTEGER PRIMARY KEY, note VARCHAR(10))",
}
_COLUMNS = "digest, space, status, headers, result, created_at, expires_at"
_FILL = {
    "postgresql": "SELECT sha256(CAST(CAST(n AS text) AS bytea)), 'http', 201, '', CAST(repeat('x', 200) AS bytea), now(), "
    "now() + :seconds * INTERVAL '1 second' FROM generate_series(1, :rows) AS n",
    "mysql": "SELECT unhex(sha2(seq, 256)), 'http', 201, '', repeat('x', 200), utc_timestamp(6), "
    "utc_timestamp(6) + INTERVAL :seconds SECOND FROM seq_1_to_{rows}",
    "sqlite": "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < :rows) "
    "SELECT randomblob(32), 'http', 201, x'', randomblob(200), '2026-01-01 00\\:00\\:00.000000', "
    "strftime('%Y-%m-%d %H\\:%M\\:%f', 'now', :seconds || ' seconds') || '000' FROM s",
}


async def work(_request: Request) -> Response:
    """Write a row."""
    await current_session().execute(_INSERT)
    return Response(b"done", 201)


def _application(manager: UnitOfWorkManager, *around: Middleware, keys: IdempotencyKeys | None = None) -> ASGIApp:
    idempotency = None if keys is None else Idempotency(keys, caller=lambda _scope: "ann")
    ours = Middleware(UnitOfWorkMiddleware, manager=manager, atomic=True, idempotency=idempotency)
    return Starlette(routes=[Route("/work", work, methods=["POST"])], middleware=[*around, ours])


def _posting(app: ASGIApp, key: Callable[[], str] | None) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        messages: list[Message] = []
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        if key is not None:
            headers.append((b"idempotency-key", key().encode()))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/work", "raw_path": b"/work", "root_path": "", "query_string": b"", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Message) -> None:  # as ASGI has it
            messages.append(message)

        await app(scope, receive, send)
        if messages[0]["status"] != 201:  # noqa: PLR2004  # created
            raise RuntimeError(f"it was answered by {messages[0]['status']}")

    return call


async def _idemkit(url: str, stack: contextlib.AsyncExitStack) -> Middleware:
    from idemkit import HttpConfig, IdempotencyMiddleware  # noqa: PLC0415  # a peer may be missing
    from idemkit.backends.postgres import PostgresBackend, init_pg  # noqa: PLC0415  # likewise

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    await init_pg(plain)
    backend = await stack.enter_async_context(PostgresBackend.from_url(plain))
    return Middleware(IdempotencyMiddleware, backend=backend, config=HttpConfig(scope=lambda _request: "ann"))


async def _fill(engine: AsyncEngine, keys: IdempotencyKeys, *, rows: int, seconds: int) -> None:
    dialect = engine.dialect.name
    rest = _FILL["mysql" if dialect == "mariadb" else dialect].replace("{rows}", str(rows))
    statement = text(f"INSERT INTO {keys.table.name} ({_COLUMNS}) {rest}")
    parameters = {"rows": rows, "seconds": seconds} if ":rows" in rest else {"seconds": seconds}
    async with engine.begin() as connection:
        await connection.execute(statement, parameters)
    if dialect == "postgresql":
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text(f"VACUUM ANALYZE {keys.table.name}"))


async def measure(url: str, rounds: int) -> dict[str, dict[str, Figure]]:
    """Return what requests take; the baseline has no key."""
    numbers = itertools.count()
    metadata = MetaData()
    few, many = IdempotencyKeys(metadata), IdempotencyKeys(metadata, name="many", keep=timedelta(days=2))
    async with contextlib.AsyncExitStack() as stack:
        engine = create_async_engine(url)
        stack.push_async_callback(engine.dispose)
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.execute(text(_WORK["mysql" if engine.dialect.name == "mariadb" else engine.dialect.name]))
        await _fill(engine, many, rows=MANY, seconds=86_400)
        manager = UnitOfWorkManager(engine)

        def new() -> str:
            return f"k{next(numbers)}"

        ours = _application(manager, keys=few)
        calls: dict[str, Any] = {
            "no key": _posting(ours, None),
            "a new key": _posting(ours, new),
            "a new key, a million rows": _posting(_application(manager, keys=many), new),
            "a repetition": _posting(ours, lambda: "again"),
        }
        if engine.dialect.name == "postgresql":
            try:
                theirs = _application(manager, await _idemkit(url, stack))
            except ImportError as error:
                left_out("idemkit", error)
            else:
                calls["idemkit, a new key"] = _posting(theirs, new)
                calls["idemkit, a repetition"] = _posting(theirs, lambda: "again")
        figures = {"a request": await compare(calls, CALLS, rounds)}
        print(f"a batch of purge() held its rows for {await _purge(manager, few):.1f} ms at most")
    return figures


async def _purge(manager: UnitOfWorkManager, keys: IdempotencyKeys) -> float:
    """Remove what has expired; return the milliseconds that one transaction had its rows for, at most."""
    await _fill(manager.engine, keys, rows=EXPIRED, seconds=-1)
    begun, held = [0.0], [0.0]

    def before(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("SELECT digest"):
            begun[0] = time.perf_counter()

    sync = manager.engine.sync_engine
    do_commit = sync.dialect.do_commit

    def commit(connection: Any) -> None:
        do_commit(connection)
        held[0] = max(held[0], time.perf_counter() - begun[0])

    event.listen(sync, "before_cursor_execute", before)
    sync.dialect.do_commit = commit  # type: ignore[method-assign]  # there is no event behind COMMIT
    try:
        removed = await keys.purge(manager)
    finally:
        event.remove(sync, "before_cursor_execute", before)
        del sync.dialect.do_commit
    if removed < EXPIRED:
        raise RuntimeError(f"{removed} rows were removed, of {EXPIRED}")
    return held[0] * 1000


def report(url: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure, print the tables, and return the figures."""
    return interleaving.report(asyncio.run(measure(url, rounds)))
