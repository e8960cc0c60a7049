"""Consumers as an application has them: two brokers, each by its own client and by FastStream.

Each one is a coroutine that consumes until it is cancelled. `work` is called with the id and the payload of a message; when it
has returned, the message is acknowledged. What can never go well is put aside, and everything else is delivered again.
"""

from __future__ import annotations

import asyncio

import aio_pika
import nats
import nats.errors
from faststream import AckPolicy
from faststream.exceptions import NackMessage, RejectMessage
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue
from nats.js.api import ConsumerConfig

from sqla_uow.errors import KeyReusedError

AT_ONCE = 20
AGAIN_AFTER = 0.05  # s
ID = "Nats-Msg-Id"
DEAD_ID = "Dead-Msg-Id"  # of a name that NATS does not know: it would leave out the second dead letter of an id
CONFIG = ConsumerConfig(ack_wait=2)
"""A consumer that has died is found out after `ack_wait` seconds: RabbitMQ sees its connection end, NATS does not."""


async def nats_plain(url, queue, work, at_once=AT_ONCE):
    """NATS by nats-py."""
    client = await nats.connect(url)
    jetstream = client.jetstream()

    async def on_message(message):
        try:
            await work(message.headers[ID], message.data)
        except KeyReusedError:
            await jetstream.publish(f"{queue}_dead", message.data, headers={DEAD_ID: message.headers[ID]})
            await message.term()
        except Exception:  # noqa: BLE001  # whatever it is
            await message.nak(delay=AGAIN_AFTER)
        else:
            await message.ack()

    try:
        subscription = await jetstream.pull_subscribe(queue, durable="bank", config=CONFIG)
        while True:
            try:
                messages = await subscription.fetch(at_once)
            except nats.errors.TimeoutError:  # there are none
                continue
            await asyncio.gather(*map(on_message, messages))
    finally:
        await client.close()


async def nats_faststream(url, queue, work, at_once=AT_ONCE):
    """NATS by FastStream."""
    broker = NatsBroker(url, logger=None)

    @broker.subscriber(
        queue,
        stream=JStream(queue, declare=False),
        durable="bank",
        config=CONFIG,
        pull_sub=PullSub(batch_size=at_once),
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )
    async def on_message(message: NatsMessage):
        try:
            await work(message.headers[ID], message.body)
        except KeyReusedError as error:
            letter = {DEAD_ID: message.headers[ID]}
            await broker.publish(message.body, f"{queue}_dead", headers=letter, stream=f"{queue}_dead")
            raise RejectMessage from error
        except Exception as error:
            raise NackMessage(delay=AGAIN_AFTER) from error

    await _run(broker)


async def rabbitmq_plain(url, queue, work, at_once=AT_ONCE):
    """RabbitMQ by aio-pika, which runs a task for each message."""
    running = set()

    async def on_message(message):
        task = asyncio.current_task()
        running.add(task)
        task.add_done_callback(running.discard)
        try:
            await work(message.message_id, message.body)
        except KeyReusedError:
            await message.reject()  # to the queue of dead letters
        except Exception:  # noqa: BLE001  # whatever it is
            await message.nack()
        else:
            await message.ack()

    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=at_once)
        declared = await channel.declare_queue(queue, durable=True, passive=True)
        tag = await declared.consume(on_message)
        try:
            await asyncio.Event().wait()
        finally:
            await declared.cancel(tag)
            await asyncio.gather(*running)


async def rabbitmq_faststream(url, queue, work, at_once=AT_ONCE):
    """RabbitMQ by FastStream."""
    broker = RabbitBroker(url, logger=None, default_channel=Channel(prefetch_count=at_once))

    @broker.subscriber(RabbitQueue(queue, durable=True, declare=False), ack_policy=AckPolicy.NACK_ON_ERROR)
    async def on_message(message: RabbitMessage):
        try:
            await work(message.message_id, message.body)
        except KeyReusedError as error:
            raise RejectMessage from error

    await _run(broker)


async def _run(broker):
    """Serve until cancelled, without FastStream's application, which takes the signals of a process."""
    async with broker:
        await broker.start()
        await asyncio.Event().wait()


CLIENTS = {
    "nats-plain": nats_plain,
    "nats-faststream": nats_faststream,
    "rabbitmq-plain": rabbitmq_plain,
    "rabbitmq-faststream": rabbitmq_faststream,
}
