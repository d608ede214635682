# SPDX-License-Identifier: Apache-2.0
"""A crowd is let in one by one, and between any two of them the event loop looks at others."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")

from ivg_fast.server.turns import Turns


def test_one_at_each_turn_of_the_loop() -> None:
    async def run() -> list[str]:
        turns = Turns()
        seen: list[str] = []

        async def comes(name: str) -> None:
            await turns.wait()
            seen.append(name)

        async def is_served() -> None:
            while len(tasks) > sum(task.done() for task in tasks):
                seen.append("-")
                await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(comes(str(i))) for i in range(8)]
        await asyncio.wait_for(is_served(), 60)
        await asyncio.wait_for(comes("late"), 60)
        return seen

    seen = asyncio.run(run())
    assert [name for name in seen if name != "-"] == [*map(str, range(8)), "late"]
    crowd = "".join(seen[: seen.index("7")])
    assert all(f"{i}{i + 1}" not in crowd for i in range(8))


def test_those_who_leave_hold_nobody_up() -> None:
    async def run() -> None:
        turns = Turns()
        first, *crowd = [asyncio.ensure_future(turns.wait()) for _ in range(6)]
        await first
        for task in crowd[:4]:
            task.cancel()
        await asyncio.wait_for(crowd[4], 60)
        await asyncio.wait_for(turns.wait(), 60)

    asyncio.run(run())
