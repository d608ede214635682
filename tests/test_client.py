# SPDX-License-Identifier: Apache-2.0
"""How the engine's events reach their clients: in order, and a few at a time."""

from __future__ import annotations

import asyncio
import itertools
import random

from ivg_fast import client
from ivg_fast.client import Client, StreamEvent, deliver


async def turns_of(deliveries: list[list[tuple[int, int]]], num_clients: int) -> list[int]:
    """Delivers (client, number) and checks the order; how many each turn of the loop handed out."""
    clients = [Client(str(i), None) for i in range(num_clients)]
    got: list[list[int]] = [[] for _ in clients]
    total = sum(map(len, deliveries))

    async def read(i: int) -> None:
        while True:
            got[i].append((await clients[i].next_event()).token_ids[0])

    readers = [asyncio.ensure_future(read(i)) for i in range(num_clients)]
    await asyncio.sleep(0)
    for items in deliveries:
        deliver([(clients[i], StreamEvent(str(i), "", (number,))) for i, number in items])
    counts = [0]
    for _ in range(10 * total):
        await asyncio.sleep(0)
        counts.append(sum(map(len, got)))
        if counts[-1] == total:
            break
    for reader in readers:
        reader.cancel()
    for i, numbers in enumerate(got):
        assert numbers == [n for items in deliveries for j, n in items if j == i]
    return [b - a for a, b in itertools.pairwise(counts)]


def test_a_crowd_is_served_a_few_at_a_time_and_in_order(monkeypatch) -> None:
    rng = random.Random(0)
    deliveries = [
        [(rng.randrange(70), 100 * k + n) for n in range(rng.randrange(90))] for k in range(4)
    ]
    per_turn = asyncio.run(turns_of(deliveries, 70))
    assert sum(per_turn) == sum(map(len, deliveries))
    assert max(per_turn) <= 8
    monkeypatch.setattr(client, "_DELIVERIES_PER_TURN", 1000)  # control: all at once
    assert max(asyncio.run(turns_of(deliveries, 70))) > 8


def test_who_is_alone_does_not_wait() -> None:
    assert [n for n in asyncio.run(turns_of([[(0, 1)]], 1)) if n] == [1]
