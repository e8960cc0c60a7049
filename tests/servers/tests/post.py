"""Leave a text at each kind of broker, confirmed by it, and see which ones are there; each call on a connection of its own."""

import asyncio
import socket
from urllib.parse import urlsplit

import pytest

from tests.servers import NATS, RabbitMQ, Redis

PATIENCE = 5  # s


def put(server, text, *, port=None):
    """Return when the broker has said that it has the text."""
    return asyncio.run(asyncio.wait_for(_PUT[type(server)](server.url(port=port), text), PATIENCE))


def texts(server, *, port=None):
    """Return all the texts, oldest first; they stay."""
    return asyncio.run(asyncio.wait_for(_TEXTS[type(server)](server.url(port=port)), PATIENCE))


async def _to_stream(url, text):
    nats = pytest.importorskip("nats")
    client = await nats.connect(url, allow_reconnect=False)
    try:
        stream = client.jetstream(timeout=2)
        await stream.add_stream(name="texts", subjects=["texts"])
        await stream.publish("texts", text.encode())
    finally:
        await client.close()


async def _from_stream(url):
    nats = pytest.importorskip("nats")
    client = await nats.connect(url, allow_reconnect=False)
    try:
        stream = client.jetstream()
        last = (await stream.stream_info("texts")).state.last_seq
        return [(await stream.get_msg("texts", number)).data.decode() for number in range(1, last + 1)]
    finally:
        await client.close()


async def _to_queue(url, text):
    aio_pika = pytest.importorskip("aio_pika")
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("texts", durable=True)
        message = aio_pika.Message(text.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, "texts")


async def _from_queue(url):
    aio_pika = pytest.importorskip("aio_pika")
    async with await aio_pika.connect(url) as connection:  # which gives back what it does not acknowledge
        queue = await (await connection.channel()).declare_queue("texts", durable=True)
        found = []
        while (message := await queue.get(fail=False)) is not None:
            found.append(message.body.decode())
        return found


async def _to_list(url, text):
    return await asyncio.to_thread(_redis, url, f"RPUSH texts {text}")


async def _from_list(url):
    lines = await asyncio.to_thread(_redis, url, "LRANGE texts 0 -1")
    return lines.split("\r\n")[2::2]  # the number of texts, and before each its length


def _redis(url, command):
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), PATIENCE) as client:
        client.sendall(f"{command}\r\nQUIT\r\n".encode())
        answer = client.makefile("rb").read().decode()
    assert answer.endswith("+OK\r\n"), answer
    return answer.removesuffix("+OK\r\n").removesuffix("\r\n")


_PUT = {NATS: _to_stream, RabbitMQ: _to_queue, Redis: _to_list}
_TEXTS = {NATS: _from_stream, RabbitMQ: _from_queue, Redis: _from_list}
