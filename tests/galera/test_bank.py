"""The bank of the tortures on three nodes: four hot rows written from all sides, and nodes that are killed."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.kit.waiting import until
from tests.torture.bank import SECONDS, WORKERS

pytestmark = [pytest.mark.drivers("asyncmy", "aiomysql"), pytest.mark.timeout(180)]
modes = pytest.mark.parametrize("mode", ["raise", "verify"])

GIVEN_UP = 2.5
"""Seconds until the others give up a dead node: evs.suspect_timeout, and one period of keepalive."""


@modes
async def test_writers_on_all_nodes(nodes, mode):
    """Hot rows from three sides: there are conflicts, none of them reaches a caller, and all nodes show the same books."""
    bank = nodes.bank(mode)
    work = asyncio.create_task(bank.work())
    await asyncio.sleep(5)
    await nodes.close(bank, work)
    assert (bank.failed, bank.unknown) == ([], [])
    assert bank.attempts > len(bank.acknowledged) > WORKERS


@modes
async def test_nodes_are_killed(nodes, mode):
    """The others' writers go on within two seconds of its being given up, and it comes back to the same books."""
    bank = nodes.bank(mode)
    work = asyncio.create_task(bank.work())
    gaps = []
    for victim in (nodes.nodes[2], nodes.nodes[0]):
        await asyncio.sleep(1)
        killed = time.monotonic()
        await asyncio.to_thread(victim.kill)
        await until(lambda since=killed: bank.acknowledged_at[-1] > since + GIVEN_UP + 2, seconds=SECONDS)
        gaps.append(bank.longest_gap_after(killed))
        await asyncio.to_thread(victim.restart)
    await asyncio.sleep(1)
    await nodes.close(bank, work)
    print(f"writers stood still for {', '.join(f'{gap:.2f}' for gap in gaps)} s")  # noqa: T201  # the figures in the docs
    assert max(gaps) < GIVEN_UP + 2
    if mode == "verify":
        assert bank.unknown == []
