"""Throwaway databases and brokers, and a TCP proxy that loses, holds and counts what passes.

    with PostgreSQL({"deadlock_timeout": "100ms"}) as server, Proxy("127.0.0.1", server.port) as proxy:
        lost = proxy.on_client_bytes(b"COMMIT", "cut")
        engine = create_async_engine(server.url("asyncpg", port=proxy.port))

Each server has a fresh folder, a loopback port of its own and a keeper: a supervising process that ends the server
and removes the folder even when the test run is killed. `python -m tests.servers postgresql mariadb nats rabbitmq redis`
serves them by hand.
"""

from .disk import SmallDisk
from .galera import Cluster
from .mariadb import MariaDB, Replica
from .nats import NATS
from .postgresql import PostgreSQL, Standby
from .proxy import Proxy
from .rabbitmq import RabbitMQ
from .redis import Redis
from .server import Server, ServerError
from .triggers import Trigger

__all__ = [
    "NATS",
    "Cluster",
    "MariaDB",
    "PostgreSQL",
    "Proxy",
    "RabbitMQ",
    "Redis",
    "Replica",
    "Server",
    "ServerError",
    "SmallDisk",
    "Standby",
    "Trigger",
]
