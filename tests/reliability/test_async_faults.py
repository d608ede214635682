# SPDX-License-Identifier: Apache-2.0
"""An AsyncEngine whose parts fail: it goes on, and each client has its own end."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from async_cases import checked, collect, serve
from engine_cases import Family, text_score
from faults import PROMPTS, FailsAt, Fault, each_alone, make_engine, on_scheduler, said, searched

from ivg_fast import AsyncEngine, RequestOutput, SearchParams
from ivg_fast.models.runner import ModelRunner

FAMILY = Family("llama", seed=5, eos_token_id=7)
PARAMS = [
    SearchParams(max_tokens=4, ignore_eos=True),
    searched(text_score, max_tokens=4),
    SearchParams(max_tokens=3, ignore_eos=True),
]


@pytest.mark.parametrize("what", ["forward", "plan", "commit_tokens", "take_result"])
def test_the_thread_outlives_what_fails_at_any_call(monkeypatch, what: str) -> None:
    alone = each_alone(FAMILY, PARAMS)

    async def client(served: AsyncEngine, i: int) -> RequestOutput:
        if i % 2:
            return await served.generate(PROMPTS[i], PARAMS[i], seed=i)
        return checked(await collect(served, PROMPTS[i], PARAMS[i], seed=i))

    async def clients(served: AsyncEngine) -> int:
        for k in itertools.count(1):
            fault.at, fault.num_calls = k, 0
            jobs = (client(served, i) for i in range(3))
            results: list[Any] = await asyncio.gather(*jobs, return_exceptions=True)
            has_failed = fault.num_calls >= k
            fault.at = 0
            assert has_failed == any(result is fault.error for result in results)
            for i, result in enumerate(results):
                assert result is fault.error or said(result) == alone[i]
            assert said(await client(served, 2)) == alone[2]
            if not has_failed:
                return k
        raise AssertionError

    engine = make_engine(FAMILY, max_num_rows=5)
    if what == "forward":
        fault = FailsAt(ModelRunner.forward, Fault("planted"))
        monkeypatch.setattr(ModelRunner, "forward", fault)
    else:
        fault = on_scheduler(what)(monkeypatch, engine)
    assert serve(engine, clients) > 3
