# SPDX-License-Identifier: Apache-2.0
"""A request that cannot be queued, whichever it is: nothing of it stays, and the others run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from async_cases import checked, collect, serve
from engine_cases import Family
from faults import PROMPTS, check_next, each_alone, make_engine, mixed_params, on_scheduler, said

from ivg_fast import AsyncEngine, QueueFullError

FAMILY = Family("llama", seed=5, eos_token_id=7)
SEEDS = range(len(PROMPTS))


@pytest.fixture(scope="module")
def alone() -> list[list[tuple]]:
    return each_alone(FAMILY, mixed_params())


@pytest.mark.parametrize("k", range(1, len(PROMPTS) + 2))
def test_of_a_loop(monkeypatch, alone, k: int) -> None:
    """One comes at each step."""
    with make_engine(FAMILY) as engine:
        fault = on_scheduler("add_request")(monkeypatch, engine)
        fault.at = k
        index: dict[int, int] = {}
        ended: dict[int, Any] = {}
        for i, (prompt, params) in enumerate(zip(PROMPTS, mixed_params(), strict=True)):
            if i + 1 == k:
                with pytest.raises(MemoryError, match="planted"):
                    engine.add_request(prompt, params, seed=i)
            else:
                index[engine.add_request(prompt, params, seed=i)] = i
            engine.check_integrity()
            ended.update(engine.step())
        while engine.has_unfinished:
            ended.update(engine.step())
            engine.check_integrity()
        assert sorted(index[request_id] for request_id in ended) == [i for i in SEEDS if i + 1 != k]
        assert all(said(output) == alone[index[i]] for i, output in ended.items())
        fault.at = 0
        check_next(engine, alone)


@pytest.mark.parametrize("k", range(1, 2 * len(PROMPTS) + 2))
def test_of_generate(monkeypatch, alone, k: int) -> None:
    """It checks every request first, when it ends at once; then it queues them one by one."""
    with make_engine(FAMILY) as engine:
        fault = on_scheduler("add_request")(monkeypatch, engine)
        fault.at = k
        told: list[int] = []

        def generate() -> list[Any]:
            return engine.generate(
                PROMPTS, mixed_params(), seeds=SEEDS, on_ended=lambda i, _: told.append(i)
            )

        if k > 2 * len(PROMPTS):
            outputs, failed = generate(), -1
        else:
            with pytest.raises(MemoryError, match="planted") as caught:
                generate()
            outputs = vars(caught.value).get("outputs", [])
            failed = k - 1 - len(PROMPTS)
            assert bool(outputs) == (failed >= 0)
            if outputs:
                assert vars(caught.value)["failures"] == {failed: fault.error}
                assert outputs[failed] is None
        for i, output in enumerate(outputs):
            assert i == failed or said(output) == alone[i], f"request {i}"
        assert sorted(told) == (list(SEEDS) if outputs else [])
        fault.at = 0
        check_next(engine, alone)


@pytest.mark.parametrize("k", SEEDS)
def test_others_fill_the_queue_while_generate_runs(monkeypatch, alone, k: int) -> None:
    """Between its look at the queue and its place in it: it waits for another."""
    with make_engine(FAMILY, max_queued_requests=2) as engine:
        fault = on_scheduler("add_request")(monkeypatch, engine)
        fault.at, fault.error = len(PROMPTS) + 1 + k, QueueFullError("planted")
        outputs = engine.generate(PROMPTS, mixed_params(), seeds=SEEDS)
        assert fault.num_calls == 2 * len(PROMPTS) + 1
        assert [said(output) for output in outputs] == alone
        fault.at = 0
        check_next(engine, alone)


@pytest.mark.parametrize("k", range(1, len(PROMPTS) + 2))
def test_of_clients(monkeypatch, alone, k: int) -> None:
    engine = make_engine(FAMILY)
    fault = on_scheduler("add_request")(monkeypatch, engine)
    fault.at = k

    async def client(served: AsyncEngine, i: int) -> Any:
        if i % 2:
            return await served.generate(PROMPTS[i], mixed_params()[i], seed=i)
        return checked(await collect(served, PROMPTS[i], mixed_params()[i], seed=i))

    async def clients(served: AsyncEngine) -> None:
        results = await asyncio.gather(*(client(served, i) for i in SEEDS), return_exceptions=True)
        assert results.count(fault.error) == (k <= len(PROMPTS))
        for i, result in enumerate(results):
            assert result is fault.error or said(result) == alone[i]
        fault.at = 0
        assert said(await client(served, 3)) == alone[3]

    serve(engine, clients)
