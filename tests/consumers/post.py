"""Who sends the messages, and looks what the broker still has of them."""

from __future__ import annotations

import aio_pika
import nats
from nats.js.api import StreamConfig

from tests.consumers.clients import DEAD_ID, ID
from tests.kit.waiting import until


class NATSPost:
    """A stream for messages, and one for dead letters.

    Args:
        queue: names them.
    """

    def __init__(self, url, queue):
        self._url, self._queue = url, queue

    async def __aenter__(self):
        self._client = await nats.connect(self._url)
        self._jetstream = self._client.jetstream()
        # NATS leaves out an id that it has seen within this time; here the consumer is to see it twice.
        for name in (self._queue, f"{self._queue}_dead"):
            await self._jetstream.add_stream(StreamConfig(name=name, subjects=[name], duplicate_window=0.1))
        return self

    async def __aexit__(self, *exc_info):
        await self._client.close()

    async def send(self, name, body):
        """Return when the broker has it."""

        async def is_new():
            return not (await self._jetstream.publish(self._queue, body, headers={ID: name})).duplicate

        await until(is_new)

    async def send_many(self, names, body):
        """Send messages of different ids."""
        for name in names:
            await self._jetstream.publish_async(self._queue, body, headers={ID: name})
        await self._jetstream.publish_async_completed()

    async def waiting(self):
        """Return how many messages no consumer has."""
        return (await self._jetstream.consumer_info(self._queue, "bank")).num_pending

    async def until_acknowledged(self):
        """Wait for that while consumers are there."""

        async def is_done():
            return not await self.left()

        await until(is_done, seconds=30)

    async def left(self):
        """Return how many messages are not acknowledged."""
        info = await self._jetstream.consumer_info(self._queue, "bank")
        return info.num_pending + info.num_ack_pending

    async def dead(self):
        """Return id and payload of each dead letter."""
        name = f"{self._queue}_dead"
        last = (await self._jetstream.stream_info(name)).state.last_seq
        letters = [await self._jetstream.get_msg(name, number) for number in range(1, last + 1)]
        return [(letter.headers[DEAD_ID], letter.data) for letter in letters]


class RabbitPost:
    """A queue for messages, and one for dead letters; as for NATS.

    Args:
        arguments: of the first one, if not as here.
    """

    def __init__(self, url, queue, arguments=None):
        self._url, self._queue = url, queue
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{queue}_dead"}
        self._arguments = arguments or dead

    async def __aenter__(self):
        self._connection = await aio_pika.connect(self._url)
        self._channel = await self._connection.channel()
        await self._channel.declare_queue(f"{self._queue}_dead", durable=True)
        await self._channel.declare_queue(self._queue, durable=True, arguments=self._arguments)
        return self

    async def __aexit__(self, *exc_info):
        await self._connection.close()

    async def send(self, name, body):
        """Return when the broker has it."""
        message = aio_pika.Message(body, message_id=name, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await self._channel.default_exchange.publish(message, self._queue)

    async def send_many(self, names, body):
        """Send messages of different ids."""
        for name in names:
            await self.send(name, body)

    async def waiting(self):
        """Return how many messages no consumer has."""
        return (await self._look(self._queue)).declaration_result.message_count

    async def until_acknowledged(self):
        """Do nothing: its consumers acknowledge what they have before they leave, and it does not tell before."""

    async def left(self):
        """Return how many messages are not acknowledged; can be asked when no consumer is there."""
        found = None

        async def is_left_alone():  # with its consumer, RabbitMQ takes back what it has not acknowledged
            nonlocal found
            found = (await self._look(self._queue)).declaration_result
            return not found.consumer_count

        await until(is_left_alone)
        return found.message_count

    async def dead(self):
        """Return id and payload of each dead letter."""
        queue = await self._look(f"{self._queue}_dead")
        letters = []
        while (letter := await queue.get(fail=False)) is not None:
            letters.append((letter.message_id, letter.body))
        return letters

    async def _look(self, name):
        return await self._channel.declare_queue(name, passive=True)


POSTS = {"nats": NATSPost, "rabbitmq": RabbitPost}
