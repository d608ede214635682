# SPDX-License-Identifier: Apache-2.0
"""What a request returns is its own: alone, among others, after others were aborted, in any order
of arrival, streamed or not; held to the naive search, with planted bugs that are seen."""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Any

import numpy as np
import pytest
from async_cases import output_of, serve
from engine_cases import Case, Family, compare, fresh_seed, random_cases, text_score
from naive_search import NaiveResult

from ivg_fast import AsyncEngine, Engine, RequestOutput, SearchParams
from ivg_fast.burst import Burst

SEED = fresh_seed()
FAMILY = Family("llama", seed=SEED, eos_token_id=7)
WAYS = {
    "whole": {"max_burst_steps": 8},
    "short": {"max_burst_steps": 3, "max_stream_steps": 1, "max_prefill_tokens": 5},
    "crowded": {"max_burst_steps": 4, "max_num_rows": 12, "max_join_steps": 1},
}


@functools.cache
def solved() -> tuple[list[Case], list[NaiveResult]]:
    rng = random.Random(f"{SEED} async")
    models = FAMILY.naive()
    cases = random_cases(rng, FAMILY, models)
    return cases, [case.solve(models) for case in cases]


@pytest.fixture(scope="module", autouse=True)
def _drop_models():
    yield
    solved.cache_clear()


def found_differences(outputs: list[RequestOutput]) -> list[str]:
    cases, results = solved()
    found, num_near_ties = compare(outputs, results, cases)
    assert num_near_ties <= 3, f"seed {SEED}"
    return found


async def _come_and_go(served: AsyncEngine, rng: random.Random) -> list[RequestOutput]:
    """Every case as one client, in random order at random moments; others beside them, with the
    same parameters and other seeds, are aborted or cancelled on their way."""
    cases, _ = solved()

    async def client(case: Case) -> RequestOutput:
        for _ in range(rng.randint(0, 30)):
            await asyncio.sleep(0)
        return await output_of(served, case, is_streamed=rng.random() < 0.5)

    async def victim(i: int, case: Case) -> None:
        name = f"victim {i}"
        running = asyncio.ensure_future(
            served.generate(case.input, case.params, seed=i, request_id=name)
        )
        for _ in range(rng.randint(0, 400)):
            await asyncio.sleep(0)
        if i % 2:
            served.abort(name)
            await running
        else:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    order = rng.sample(range(len(cases)), len(cases))
    clients = {i: asyncio.ensure_future(client(cases[i])) for i in order}
    victims = [victim(i, rng.choice(cases)) for i in range(20)]
    await asyncio.gather(*victims, *clients.values())
    return [clients[i].result() for i in range(len(cases))]


@pytest.mark.parametrize("way", WAYS)
def test_clients_that_come_and_go(way: str) -> None:
    rng = random.Random(f"{SEED} {way}")
    engine = FAMILY.engine(**WAYS[way])
    outputs = serve(engine, lambda served: _come_and_go(served, rng))
    found = found_differences(outputs)
    assert not found, f"seed {SEED}\n" + "\n".join(found)


def test_one_client_at_a_time() -> None:
    async def clients(served: AsyncEngine) -> list[RequestOutput]:
        return [await output_of(served, case, is_streamed=True) for case in solved()[0]]

    found = found_differences(serve(FAMILY.engine(), clients))
    assert not found, f"seed {SEED}\n" + "\n".join(found)


def _run_beside_aborted(engine: Engine, rng: random.Random) -> list[RequestOutput]:
    """Through Engine itself: at each step some arrive and some of the others are aborted."""
    cases, _ = solved()
    waiting = rng.sample(range(len(cases)), len(cases))
    number: dict[int, int] = {}
    others: list[int] = []
    ended: dict[int, Any] = {}
    while waiting or engine.has_unfinished:
        for _ in range(rng.choice([0, 1, 2])):
            other = rng.choice(cases)
            others.append(engine.add_request(other.input, other.params, seed=rng.randrange(99)))
            if waiting:
                i = waiting.pop()
                number[engine.add_request(cases[i].input, cases[i].params, seed=cases[i].seed)] = i
        for request_id in rng.sample(others, len(others) // 2):
            engine.abort(request_id)
        if not waiting:
            for request_id in others:
                engine.abort(request_id)
        ended.update(
            (number[request_id], output)
            for request_id, output in engine.step()
            if request_id in number
        )
        engine.check_integrity()
    assert engine.stats()["num_blocks_used"] == 0
    return [ended[i] for i in range(len(cases))]


@pytest.mark.parametrize("bug", ["", "slot", "batch"])
def test_beside_requests_that_are_aborted(monkeypatch, bug: str) -> None:
    """The controls: random numbers by the row in the batch, or by what else is in it."""
    real = Burst._sampling

    def planted(self, members):
        arguments = real(self, members)
        shift = members if bug == "slot" else np.full(len(members), len(members))
        arguments["candidate_ids"] = (arguments["candidate_ids"] + shift).astype(np.int32)
        return arguments

    if bug:
        monkeypatch.setattr(Burst, "_sampling", planted)
    rng = random.Random(f"{SEED} aborted")
    cases, results = solved()
    outputs = _run_beside_aborted(FAMILY.engine(max_burst_steps=4, max_num_rows=20), rng)
    found, num_near_ties = compare(outputs, results, cases)
    if bug:
        assert len(found) >= 3
    else:
        assert not found, f"seed {SEED}\n" + "\n".join(found)
        assert num_near_ties <= 3


def test_scores_that_come_late_change_nothing() -> None:
    """Every callable of a request its own, each on its thread, some of them slow to start."""
    rng = random.Random(f"{SEED} late")
    params = SearchParams.cbs(
        max_tokens=12, beam_width=2, num_candidates=2, chunk_length=3, scorer=text_score, n=4
    )
    prompts = [[rng.randrange(8, 28) for _ in range(rng.randint(1, 20))] for _ in range(8)]
    cases = [Case(prompt, params, seed) for seed, prompt in enumerate(prompts)]
    models = FAMILY.naive()
    results = [case.solve(models) for case in cases]

    async def clients(served: AsyncEngine) -> list[RequestOutput]:
        async def client(case: Case) -> RequestOutput:
            await asyncio.sleep(0.001 * rng.randint(0, 9))
            return await output_of(served, case, is_streamed=True)

        return await asyncio.gather(*map(client, cases))

    found, _ = compare(serve(FAMILY.engine(scorer_timeout_s=60.0), clients), results, cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)
