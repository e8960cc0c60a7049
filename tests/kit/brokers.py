"""The brokers of one test run, started when they are first needed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from tests.servers import NATS, RabbitMQ

if TYPE_CHECKING:
    from tests.servers.broker import Broker

BROKERS: dict[str, type[Broker]] = {"nats": NATS, "rabbitmq": RabbitMQ}


def need_clients() -> None:
    """Skip the module that is being imported if the packages that speak to brokers are not there."""
    missing = [name for name in ("aio_pika", "faststream", "nats") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install --group brokers", allow_module_level=True)


class Brokers:
    """One of each kind, shared by tests that each take a queue of their own."""

    def __init__(self) -> None:
        self._running: dict[str, Broker] = {}

    def get(self, name: str) -> Broker:
        """Return one that runs, or skip the test."""
        if name not in self._running:
            if (reason := BROKERS[name].unavailable()) is not None:
                pytest.skip(reason)
            broker = BROKERS[name]()
            broker.start()
            self._running[name] = broker
        return self._running[name]

    def stop(self) -> None:
        for broker in self._running.values():
            broker.stop()
