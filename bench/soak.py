# SPDX-License-Identifier: Apache-2.0
"""`python -m bench soak`: many short requests through AsyncEngine that abort, fail and leave.

Clients come and go on a tiny random model: streams and whole outputs, searches whose scorer is a
callable, some of which raise; clients abort, cancel, close their stream, or set deadlines. Each
request must end in exactly one way, and the memory of a long run must be flat once three tenths of
it have passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ivg_fast import AsyncEngine, Engine, EngineConfig, QueueFullError, ScorerError, SearchParams
from ivg_fast.assets import imdb_path
from ivg_fast.models.loading import load_tokenizer
from ivg_fast.params import ScoreInput

MAX_GROWTH_MB = 8.0
MIN_JUDGED = 10_000  # requests; until a few thousand have run the allocators still grow


def tiny_engine() -> Engine:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(imdb_path() / "base")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    limits = EngineConfig(
        num_blocks=256,
        max_num_rows=48,
        max_burst_steps=4,
        max_join_steps=4,
        max_prefill_tokens=64,
        max_queued_requests=48,
        scorer_timeout_s=60.0,
        num_threads=1,
    )
    return Engine(model, tokenizer, config=limits)


def scores(inputs: list[ScoreInput]) -> list[float]:
    return [float(sum(item.token_ids) % 13) for item in inputs]


def raises(inputs: list[ScoreInput]) -> list[float]:
    raise ValueError("planted")


@dataclass
class Soak:
    """What has happened so far.

    Attributes:
        outcomes: what the clients saw, once each; a request that was refused is made again.
        ends: how often the engine has ended each request, by its id.
        rss_mb: resident memory at each tenth.
    """

    num_requests: int
    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    num_accepted: int = 0
    rss_mb: list[float] = field(default_factory=list)
    num_started: int = 0
    num_refused: int = 0

    def params(self) -> SearchParams:
        rng = self.rng
        common: dict[str, Any] = {"max_tokens": rng.randint(1, 16)}
        if rng.random() < 0.1:
            common["deadline_s"] = rng.choice([0.0, 0.005, 0.02])
        kind = rng.random()
        if kind < 0.5:
            return SearchParams(**common)
        scorer = raises if rng.random() < 0.05 else scores
        if kind < 0.7:
            return SearchParams.best_of_n(3, scorer=scorer, **common)
        return SearchParams.cbs(
            beam_width=2, num_candidates=2, chunk_length=4, scorer=scorer, **common
        )

    async def request(self, served: AsyncEngine, number: int) -> str:
        """One request; how it ended for its client."""
        rng = self.rng
        prompt = [rng.randrange(10, 100) for _ in range(rng.randint(1, 40))]
        name, way = str(number), rng.random()
        try:
            if way < 0.1:
                asyncio.get_running_loop().call_later(0.02 * rng.random(), served.abort, name)
            if way < 0.5:
                output = await served.generate(prompt, self.params(), request_id=name)
                return output.outputs[0].finish_reason
            if way < 0.6:
                task = served.generate(prompt, self.params(), request_id=name)
                await asyncio.wait_for(task, 0.02 * rng.random())
                return "in time"
            stream = served.stream(prompt, self.params(), request_id=name)
            leaves = way < 0.65
            async for event in stream:
                if event.output is not None:
                    return event.output.outputs[0].finish_reason
                if leaves:
                    await stream.aclose()
                    return "left"
        except ScorerError:
            return "scorer failed"
        except QueueFullError:
            return "refused"
        except TimeoutError:
            return "cancelled"
        raise RuntimeError("a stream has ended without an output")

    async def client(self, served: AsyncEngine) -> None:
        while self.num_started < self.num_requests:
            number = self.num_started
            self.num_started += 1
            while (outcome := await self.request(served, number)) == "refused":
                self.num_refused += 1
                await asyncio.sleep(0.05)
            self.outcomes[outcome] += 1
            if self.num_started * 10 // self.num_requests > len(self.rss_mb):
                self.rss_mb.append(resident_mb())
                print(f"{self.num_started:>7} started, {self.rss_mb[-1]:.1f} MB", flush=True)

    async def run(self, engine: Engine, num_clients: int) -> None:
        add, step = engine.add_request, engine.step

        def counted_add(*args: Any, **options: Any) -> int:
            request_id = add(*args, **options)
            self.num_accepted += 1
            return request_id

        def counted_step() -> list:
            ended = step()
            self.ends.update(request_id for request_id, _ in ended)
            engine.check_integrity()
            return ended

        engine.add_request, engine.step = counted_add, counted_step  # type: ignore[method-assign]
        async with AsyncEngine(engine) as served:
            await asyncio.gather(*(self.client(served) for _ in range(num_clients)))
            while engine.has_unfinished:
                await asyncio.sleep(0.001)
            held = {k: v for k, v in engine.stats().items() if k != "num_blocks" and v}
            left = [served._clients, served._running, served._unclaimed, engine._loop._live]
            if held or any(left):
                raise RuntimeError(f"left behind: {held}, {left}")

    def check(self) -> None:
        """Raises RuntimeError unless every request has ended, once."""
        if sum(self.outcomes.values()) != self.num_requests:
            raise RuntimeError(f"{self.num_requests} requests, outcomes {self.outcomes}")
        twice = {i: n for i, n in self.ends.items() if n != 1}
        if twice or len(self.ends) != self.num_accepted:
            raise RuntimeError(f"{self.num_accepted} accepted, {len(self.ends)} ended, {twice}")

    @property
    def growth_mb(self) -> float:
        """Memory since the first three tenths."""
        return max(self.rss_mb[3:], default=0.0) - max(self.rss_mb[:3], default=0.0)


def resident_mb() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(num_requests: int, num_clients: int, seed: int, timeout_s: float | None = None) -> Soak:
    """Runs it.

    Raises:
        RuntimeError: blocks or requests are left behind, or one has not ended exactly once.
        TimeoutError: a client waits for ever.
    """
    state = Soak(num_requests, random.Random(seed))
    run = state.run(tiny_engine(), num_clients)
    asyncio.run(asyncio.wait_for(run, timeout_s))
    state.check()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    state = soak(options.requests, options.clients, options.seed)
    figures = {
        "requests": options.requests,
        "clients": options.clients,
        "accepted": state.num_accepted,
        "refused": state.num_refused,
        "outcomes": dict(sorted(state.outcomes.items())),
        "rss_mb": [round(value, 1) for value in state.rss_mb],
        "growth_mb": round(state.growth_mb, 1),
        "seconds": round(time.monotonic() - begin, 1),
    }
    print(json.dumps(figures))
    if options.requests < MIN_JUDGED:
        print(f"memory is not judged below {MIN_JUDGED} requests", file=sys.stderr)
    elif state.growth_mb > MAX_GROWTH_MB:
        raise SystemExit(f"memory has grown by {state.growth_mb:.1f} MB")
