"""Throwaway PostgreSQL and MariaDB servers.

    with PostgreSQL({"deadlock_timeout": "100ms"}) as server:
        engine = create_async_engine(server.url("asyncpg"))

Each server has a fresh folder, a loopback port of its own and a keeper: a supervising process that ends the server
and removes the folder even when the test run is killed.
"""

from .mariadb import MariaDB
from .postgresql import PostgreSQL
from .server import Server, ServerError

__all__ = ["MariaDB", "PostgreSQL", "Server", "ServerError"]
