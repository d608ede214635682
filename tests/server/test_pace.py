# SPDX-License-Identifier: Apache-2.0
"""Bytes that arrive together are read in their order, a few at each turn of the loop."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")

import requests
from fastapi import FastAPI
from serving import MODEL, make_engine, serving
from uvicorn.server import ServerState

from ivg_fast.server.config import ServerConfig
from ivg_fast.server.pace import PacedProtocol, paced
from ivg_fast.server.serve import make_server


def connections(kind: type[PacedProtocol], count: int) -> list[PacedProtocol]:
    config = make_server(FastAPI(), ServerConfig(port=0)).config
    config.load()
    return [kind(config, ServerState(), {}) for _ in range(count)]


def test_a_few_at_each_turn_in_their_order() -> None:
    async def main() -> None:
        read: list[tuple[int, bytes]] = []
        turns = []

        class Recording(paced()):
            def read(self, data: bytes) -> None:
                read.append((own.index(self), data))

        own = connections(Recording, 10)
        arrived = [(i % 10, bytes([i])) for i in range(23)]
        for i, data in arrived:
            own[i].data_received(data)
        while len(read) < len(arrived):
            turns.append(len(read))
            await asyncio.sleep(0)
        assert read == arrived
        assert turns == [0, 4, 8, 12, 16, 20]
        own[3].data_received(b"later")
        await asyncio.sleep(0)
        assert read[-1] == (3, b"later")

    asyncio.run(main())


def test_servers_do_not_wait_for_each_other() -> None:
    assert paced().unread is not paced().unread


def test_what_a_lost_connection_sent_is_not_read() -> None:
    async def main() -> None:
        (own,) = connections(paced(), 1)
        own.data_received(b"GET / HTTP/1.1\r\n\r\n")
        own.parser = None  # as uvicorn's connection_lost leaves it
        await asyncio.sleep(0)
        assert not own.unread
        assert own.cycle is None

    asyncio.run(main())


def test_requests_in_one_connection() -> None:
    """One after another over a connection that stays open, their bodies in pieces."""
    with serving(make_engine()) as server, requests.Session() as session:
        url, headers = f"{server.url}/v1/completions", {"Content-Type": "application/json"}
        for seed in range(5):
            fields = {"prompt": "a", "max_tokens": 2, "seed": seed}
            whole = server.client().completions.create(model=MODEL, **fields)
            text = json.dumps({"model": MODEL, **fields}).encode()
            pieces = (text[i : i + 7] for i in range(0, len(text), 7))
            response = session.post(url, data=pieces, headers=headers, timeout=60)
            assert response.json()["choices"][0]["text"] == whole.choices[0].text
