# SPDX-License-Identifier: Apache-2.0
"""`python -m bench serve`: `ivg-fast serve` under load from another process, streams all of them.

- clients: 1 to 64 that each ask again when they are answered, for the base model alone (W, K = 1,
  1) and for IVG (W, K, L = 4, 4, 5): tokens a second, time to the first event, between tokens, end
  to end, and by how much the server's event loop comes late; of the IMDB family, and of a tiny one
  whose models take next to no time;
- joins: one more client among 4 whose searches have the same long chunks, with
  EngineConfig.max_join_steps at that length (it waits for their boundary) and below;
- overload: requests at 4 times the rate that 64 clients got through, with a queue of 64: how many
  are shed with status 429, how soon, and whether all others are answered.

A time between tokens is that between two events, a token of the second: a search decides tokens at
its selections. A loop delay is the upper bound of the bucket of /metrics that p99.9 lies in; beside
it stands that of a process which has nothing to do, on the same cores in the same seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.http_load import (
    Answer,
    ask,
    closed_loop,
    loop_delays,
    open_loop,
    quantile_bound,
    server_process,
)
from bench.idle_loop import idle_loop
from bench.run import OURS, Run, parser_of
from ivg_fast.assets import imdb_path
from ivg_fast.training.common import load_tokenizer
from ivg_fast.training.data import test_prompts
from ivg_fast.training.value_model import PrefixValueModel

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
QUICK_CLIENTS = (1, 16, 64)
NUM_QUEUED = 64
OVERLOAD = 4
NUM_SEARCHING, LONG_CHUNK = 4, 20
IDLE = "idle process"
JOIN_STEPS = (LONG_CHUNK, 5, 0)
SEARCHES: dict[str, dict[str, Any]] = {
    "base": {},
    "IVG": {
        "guidance": "implicit",
        "guidance_weight": 0.5,
        "scorer": "explicit",
        "beam_width": 4,
        "num_candidates": 4,
        "chunk_length": 5,
    },
}


def make_tiny(folder: Path) -> None:
    """A family with random weights and the IMDB family's tokenizer."""
    tokenizer = load_tokenizer(imdb_path() / "base")
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "n_positions": 512, "n_embd": 64, "n_layer": 2}
    config = GPT2Config(**sizes, n_head=2, **ends)
    for role in ("base", "tuned", "untuned"):
        GPT2LMHeadModel(config).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    value = PrefixValueModel(GPT2LMHeadModel(config).transformer, "vocabulary")
    torch.nn.init.normal_(value.delta)
    value.save(folder / "value", tokenizer, "float32")


def bodies_of(search: Mapping[str, Any], num_tokens: int) -> Iterator[dict[str, Any]]:
    """Held-out prompts again and again, each time with another seed."""
    fixed = {"max_tokens": num_tokens, "temperature": 0.7, "ignore_eos": True, **search}
    for seed, prompt in enumerate(itertools.cycle(test_prompts(64))):
        yield {"prompt": prompt, "seed": seed, **fixed}


def add_times(
    run: Run, kernel: str, x: Mapping[str, int], metric: str, seconds: Sequence[float], config: str
) -> None:
    """Milliseconds: 20th, 50th, 80th percentile, and p95 and p99 by themselves."""
    if not len(seconds):
        return
    times = np.asarray(seconds) * 1e3
    run.add(kernel, OURS, metric, "ms", x, times, config)
    for name, q in (("p95", 95), ("p99", 99)):
        value = float(f"{np.percentile(times, q):.4g}")
        run.add(kernel, OURS, f"{metric}, {name}", "ms", x, [value], config)


def between_tokens(answer: Answer, num_tokens: int) -> list[float]:
    """Seconds a token of each event but the first; tokens are spread evenly over the events."""
    each = num_tokens / len(answer.arrivals)
    return [(b - a) / each for a, b in itertools.pairwise(answer.arrivals)]


@dataclass(frozen=True, slots=True)
class UnderLoad:
    """A server, and what is asked of each number of clients.

    Attributes:
        idle_delays: of `idle_loop`.
        min_seconds: for as long at least, so that p99.9 is not that of a few looks.
    """

    port: int
    family: str
    idle_delays: Callable[[], Sequence[float]]
    min_seconds: float


def level(
    run: Run, server: UnderLoad, name: str, num_clients: int, num_tokens: int, rounds: int
) -> float:
    """One number of clients; requests a second."""
    config = f"{server.family} family, float32, {num_tokens} tokens, T 0.7, streamed"
    shown = name if server.family == "IMDB" else f"{name}, {server.family} models"
    kernel, x = f"serve, {shown}", {"clients": num_clients}
    bodies = bodies_of(SEARCHES[name], num_tokens)
    num_requests = max(rounds, rounds // 2 * num_clients)
    before, _ = loop_delays(server.port), server.idle_delays()
    load = closed_loop(server.port, num_clients, num_requests, bodies, server.min_seconds)
    answers, seconds = asyncio.run(load)
    delay = quantile_bound(before, loop_delays(server.port), 0.999) * 1e3
    idle = float(f"{np.quantile(server.idle_delays(), 0.999) * 1e3:.2g}")
    if not all(answer.is_whole for answer in answers):
        raise RuntimeError("a request was not answered")
    rate = len(answers) / seconds
    run.add(kernel, OURS, "throughput", "tokens/s", x, [float(f"{rate * num_tokens:.4g}")], config)
    first = [answer.arrivals[0] for answer in answers]
    between = [t for answer in answers for t in between_tokens(answer, num_tokens)]
    add_times(run, kernel, x, "time to first event", first, config)
    add_times(run, kernel, x, "time between tokens", between, config)
    add_times(run, kernel, x, "end to end", [answer.seconds for answer in answers], config)
    run.add(kernel, OURS, "event loop delay, p99.9", "ms", x, [delay], config)
    run.add(kernel, IDLE, "idle loop delay, p99.9", "ms", x, [idle], config)
    print(
        f"{kernel:<14} {num_clients:>3} clients {rate * num_tokens:>8.1f} tokens/s, first event "
        f"{np.median(first) * 1e3:.0f} ms, loop delay p99.9 <= {delay:.0f} ms, idle {idle:.1f} ms",
        flush=True,
    )
    return rate


def overload(run: Run, port: int, name: str, rate: float, num_tokens: int, seconds: float) -> None:
    """More than it can do."""
    config = f"IMDB family, float32, {num_tokens} tokens, T 0.7, streamed, queue {NUM_QUEUED}"
    kernel, x = f"serve, {name}, overload", {"times": OVERLOAD}
    count = max(int(OVERLOAD * rate * seconds), OVERLOAD * NUM_QUEUED)
    load = open_loop(port, OVERLOAD * rate, count, bodies_of(SEARCHES[name], num_tokens))
    answers, _ = asyncio.run(load)
    shed = [answer for answer in answers if answer.status == 429]
    accepted = [answer for answer in answers if answer.status == 200]
    if len(shed) + len(accepted) < count or not all(answer.is_whole for answer in accepted):
        raise RuntimeError("a request was neither answered nor shed")
    run.add(kernel, OURS, "shed", "%", x, [round(100 * len(shed) / count, 1)], config)
    add_times(run, kernel, x, "time to status 429", [answer.seconds for answer in shed], config)
    add_times(run, kernel, x, "end to end", [answer.seconds for answer in accepted], config)
    print(
        f"{kernel}: {count} requests, {len(shed)} shed, {len(accepted)} accepted and finished",
        flush=True,
    )


async def join_times(port: int, num_tokens: int, count: int) -> list[float]:
    """Seconds to the first event of requests that come one by one, at any moment, to a server
    that NUM_SEARCHING others keep at work.

    They keep a single survivor, so that their first chunk is decided when it is selected.
    """
    search = {**SEARCHES["IVG"], "chunk_length": LONG_CHUNK}
    bodies = bodies_of(search, num_tokens)
    own = bodies_of({**search, "beam_width": 1}, num_tokens)
    moments = random.Random(0)

    async def others() -> None:
        while True:
            await ask(port, next(bodies))

    tasks = [asyncio.ensure_future(others()) for _ in range(NUM_SEARCHING)]
    try:
        await ask(port, next(bodies))
        times = []
        for _ in range(count):
            await asyncio.sleep(moments.uniform(0, 1))
            times.append((await ask(port, next(own))).arrivals[0])
        return times
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def joins(run: Run, num_threads: int, num_tokens: int, *, is_quick: bool) -> None:
    """A server for each setting."""
    config = f"IMDB family, float32, {num_tokens} tokens, T 0.7, streamed, chunks of {LONG_CHUNK}"
    for steps in JOIN_STEPS[:: 2 if is_quick else 1]:
        with server_process(imdb_path(), num_threads, "--max-join-steps", str(steps)) as port:
            times = asyncio.run(join_times(port, num_tokens, 4 if is_quick else 20))
        x = {"max_join_steps": steps}
        add_times(run, "serve, IVG, joins", x, "time to first event", times, config)
        print(f"max_join_steps {steps}: first event {np.median(times) * 1e3:.0f} ms", flush=True)


def main() -> None:
    options = parser_of(__doc__, has_cold=False, has_limit=False).parse_args()
    run = Run("serve", options, sys.argv[1:], num_rounds=(8, 4))
    num_tokens = 20 if options.quick else 40
    min_seconds = 0.0 if options.quick else 12.0
    gains = {}
    queue = ("--max-queued-requests", str(NUM_QUEUED))
    with idle_loop() as idle_delays:
        with server_process(imdb_path(), options.threads, *queue) as port:
            server = UnderLoad(port, "IMDB", idle_delays, min_seconds)
            for name in SEARCHES:
                bodies = bodies_of(SEARCHES[name], num_tokens)
                asyncio.run(closed_loop(port, 4, 8, bodies))  # a warm-up
                rates = {
                    clients: level(run, server, name, clients, num_tokens, run.num_rounds)
                    for clients in (QUICK_CLIENTS if options.quick else CLIENTS)
                }
                gains[name] = round(rates[16] / rates[1], 2)
                overload(run, port, name, rates[64], num_tokens, 4.0)
        with tempfile.TemporaryDirectory() as folder:
            make_tiny(Path(folder))
            with server_process(Path(folder), options.threads) as port:
                server = UnderLoad(port, "tiny", idle_delays, min_seconds)
                for name, search in SEARCHES.items():
                    asyncio.run(closed_loop(port, 4, 8, bodies_of(search, num_tokens)))
                    for clients in QUICK_CLIENTS:
                        level(run, server, name, clients, num_tokens, run.num_rounds)
    joins(run, options.threads, 2 * LONG_CHUNK, is_quick=options.quick)
    run.finish(throughput_16_clients_over_1=gains)
