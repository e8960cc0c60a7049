"""The other middlewares that keep a session for a request, each set up as its documentation has it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.middleware import Middleware

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

__all__ = ["PEERS", "Web"]


class Web(NamedTuple):
    """A middleware, and how an endpoint behind it gets its session."""

    middleware: list[Middleware]
    session: Callable[[Request], Awaitable[AsyncSession]]
    dispose: Callable[[], Awaitable[None]]


async def context_async(url: str) -> Web:
    """context-async-sqlalchemy, its pure ASGI middleware."""
    from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session

    connect = DBConnect(create_async_engine, lambda engine: async_sessionmaker(engine, expire_on_commit=False), url)

    async def session(_request: Request) -> Any:
        return await db_session(connect)

    return Web([Middleware(ASGIHTTPDBSessionMiddleware)], session, connect.close)


async def fastapi_async(url: str) -> Web:
    """fastapi-async-sqlalchemy, committing at the end."""
    from fastapi_async_sqlalchemy.middleware import create_middleware_and_session_proxy

    middleware, proxy = create_middleware_and_session_proxy()
    engine = create_async_engine(url)

    async def session(_request: Request) -> Any:
        return proxy.session

    return Web([Middleware(middleware, custom_engine=engine, commit_on_exit=True)], session, engine.dispose)


async def fastapi_sqla(url: str) -> Web:
    """fastapi-sqla, which is configured by the environment."""
    import structlog
    from fastapi_sqla import async_sqla

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    os.environ["sqlalchemy_url"] = url  # noqa: SIM112  # its spelling
    await async_sqla.startup()
    del os.environ["sqlalchemy_url"]  # noqa: SIM112
    factory: Any = async_sqla._async_session_factories["default"]  # noqa: SLF001  # to dispose of its engine
    dependency = async_sqla.AsyncSessionDependency()

    async def session(request: Request) -> Any:
        return dependency(request)

    return Web([Middleware(async_sqla.AsyncSessionMiddleware)], session, factory.kw["bind"].dispose)


async def advanced_alchemy(url: str) -> Web:
    """advanced-alchemy's extension for Starlette, committing after the body."""
    from advanced_alchemy.extensions.starlette import AdvancedAlchemy, AsyncSessionConfig, SQLAlchemyAsyncConfig
    from starlette.applications import Starlette

    config = SQLAlchemyAsyncConfig(
        connection_string=make_url(url).render_as_string(hide_password=False),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    )
    app = Starlette()
    extension = AdvancedAlchemy(config=config, app=app)

    async def session(request: Request) -> Any:
        return extension.get_async_session(request)

    return Web(list(app.user_middleware), session, config.get_engine().dispose)


PEERS: dict[str, Callable[[str], Awaitable[Web]]] = {
    "context-async-sqlalchemy": context_async,
    "fastapi-async-sqlalchemy": fastapi_async,
    "fastapi-sqla": fastapi_sqla,
    "advanced-alchemy": advanced_alchemy,
}
