# SPDX-License-Identifier: Apache-2.0
"""`python -m bench ops`: guided_sample and token_logprobs against plain PyTorch, side by side.

"read" is a plain read of the logits (torch.sum of each tensor): the least that any sampler pays.
Shares are of the bandwidth at which the same run reads one large tensor. On a GPU, single calls
count what the host takes to launch them; "graph" is the device's time alone, there against the
bandwidth at which it copies.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import torch_samplers as plain
from bench.harness import Call, Stopwatch, cache_bytes, num_cold_sets, take_turns
from bench.run import OURS, Run, at_least_one, parser_of
from ivg_fast.ops.guided_sample import guided_sample
from ivg_fast.ops.philox import uniform
from ivg_fast.ops.token_logprobs import pair_token_logprobs

WEIGHT, TEMPERATURE = 1.0, 0.7
EAGER, COMPILED = "multinomial chain", "torch.compile, hierarchical"
ISAS = ("avx512", "avx2", "baseline")
# (rows, vocabulary): along rows, along the vocabulary
QUICK = ((1, 32_000), (16, 32_000), (16, 128_256))
SHAPES = (*QUICK, (4, 32_000), (64, 32_000), (16, 8_192), (1, 128_256))
# What the targets are about comes first, for runs that end before the last.
GPU_QUICK = ((16, 32_000), (64, 128_256), (256, 128_256))
GPU_SHAPES = (*GPU_QUICK, (16, 128_256), (1, 128_256), (64, 32_000), (256, 32_000), (1, 32_000))


class Batch:
    """Random logits of B rows and V columns, and the addresses of their draws."""

    def __init__(
        self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        # What a kernel takes as it is; a GPU would convert anything else by a launch more.
        narrow = torch.int64 if device == "cuda" else torch.int32
        self.logits = tuple(
            (torch.randn(num_rows, vocab_size, device=device) * 3).to(dtype) for _ in range(3)
        )
        self.index: dict[str, Any] = {
            "seeds": torch.arange(num_rows, device=device),
            "candidate_ids": torch.arange(num_rows, device=device, dtype=narrow),
            "positions": torch.full((num_rows,), 7, device=device, dtype=narrow),
        }
        self.u = uniform(**self.index).float()
        self.x = {"B": num_rows, "V": vocab_size}
        self.num_bytes = num_rows * vocab_size * dtype.itemsize  # of one tensor
        self.config = f"{str(dtype)[6:]}, three tensors, T {TEMPERATURE}, weight {WEIGHT}"

    def ours(self, **setting: Any) -> Call:
        arguments = {"weight": WEIGHT, "temperature": TEMPERATURE, **setting, **self.index}
        return lambda: guided_sample(*self.logits, **arguments)

    def theirs(self, sampler: Any, *arguments: Any) -> Call:
        return lambda: sampler(*self.logits, WEIGHT, TEMPERATURE, *arguments)

    def read(self) -> list[Tensor]:
        return [x.sum() for x in self.logits]


# torch.multinomial may wait for the device, which no graph can hold.
WAITING = (EAGER, "sort chain", "torch.topk chain")
FILTERS = {"top-k 50": (50, 1.0), "top-p 0.9": (0, 0.9), "both": (50, 0.9)}


def unfiltered(batch: Batch, compiled: Any) -> dict[str, Call]:
    return {
        OURS: batch.ours(),
        EAGER: batch.theirs(plain.multinomial),
        "cumsum + searchsorted": batch.theirs(plain.inverse_cdf, batch.u),
        COMPILED: batch.theirs(compiled, batch.u),
        "read": batch.read,
    }


def filtered(batch: Batch, name: str) -> dict[str, Call]:
    top_k, top_p = FILTERS[name]
    providers = {
        OURS: batch.ours(top_k=top_k, top_p=top_p),
        "sort chain": batch.theirs(plain.sorted_filters, top_k, top_p),
    }
    if name == "top-k 50":
        providers["torch.topk chain"] = batch.theirs(plain.topk_filter, top_k)
    return providers


def scoring(batch: Batch) -> dict[str, Call]:
    _, tuned, untuned = batch.logits
    ids = torch.arange(len(tuned), device=tuned.device)

    def log_softmax() -> Tensor:
        difference = tuned.float().log_softmax(1) - untuned.float().log_softmax(1)
        return difference.gather(1, ids[:, None])

    return {
        OURS: lambda: pair_token_logprobs(tuned, untuned, ids),
        "log_softmax and gather": log_softmax,
        "read": lambda: [tuned.sum(), untuned.sum()],
    }


def measure(run: Run, num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Every kernel at one shape."""
    torch._dynamo.reset()  # else it gives up after so many shapes
    compiled = torch.compile(plain.hierarchical, dynamic=False)
    batch = Batch(num_rows, vocab_size, dtype, run.device)
    batches = [batch]
    if run.uses_graphs:
        num_sets = num_cold_sets(3 * batch.num_bytes, cache_bytes(run.device))
        batches += [
            Batch(num_rows, vocab_size, dtype, run.device, seed) for seed in range(1, num_sets)
        ]
    kernels: dict[str, tuple[Callable[[Batch], dict[str, Call]], int]] = {
        "guided_sample": (lambda one: unfiltered(one, compiled), 3),
        **{
            f"guided_sample, {name}": (lambda one, name=name: filtered(one, name), 3)
            for name in FILTERS
        },
        "pair_token_logprobs": (scoring, 2),
    }
    for kernel, (make, num_tensors) in kernels.items():
        config = batch.config.replace("three", {2: "two", 3: "three"}[num_tensors])
        num_bytes = num_tensors * batch.num_bytes
        run.compare(kernel, batch.x, make(batch), config, num_bytes=num_bytes)
        if run.uses_graphs:
            sets = [
                {name: call for name, call in make(one).items() if name not in WAITING}
                for one in batches
            ]
            run.compare_in_graphs(kernel, batch.x, sets, config, num_bytes=num_bytes)


def instruction_sets() -> dict[str, float]:
    """Median microseconds of each instruction set at B=16, V=32,000, processes taking turns."""
    times: dict[str, list[float]] = {}
    for _ in range(3):
        for isa in ISAS:
            command = [sys.executable, "-m", "bench", "ops", "--isa-child"]
            environment = {**os.environ, "IVG_FAST_CPU_ISA": isa}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if "lacks that instruction set" in done.stderr:
                continue
            if done.returncode:
                raise RuntimeError(done.stderr)
            times.setdefault(isa, []).append(json.loads(done.stdout.splitlines()[-1]))
    return {isa: statistics.median(each) for isa, each in times.items()}


def _isa_child() -> None:
    """Prints the median microseconds of this process's instruction set."""
    call = Batch(16, 32_000, torch.float32, "cpu").ours()
    times = take_turns(Stopwatch("cpu", is_cold=True), {OURS: call}, 50, 2)
    print(statistics.median(times[OURS]) * 1e6)


def main() -> None:
    argv = sys.argv[1:]
    parser = parser_of(__doc__, has_cuda=True)
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=at_least_one, nargs="+", help="default with --vocab: 16")
    parser.add_argument(
        "--vocab", type=at_least_one, nargs="+", help="default with --rows: 32000 128256"
    )
    parser.add_argument("--no-isas", action="store_true", help="skip the instruction sets")
    parser.add_argument("--isa-child", action="store_true", help="used by the bench itself")
    options = parser.parse_args()
    if options.isa_child:
        _isa_child()
        return
    run = Run("ops", options, argv)
    run.measure_limits()
    dtype = options.dtype or ("float32" if run.device == "cpu" else "bfloat16")
    if run.device == "cpu":
        shapes = QUICK if options.quick else SHAPES
    else:
        shapes = GPU_QUICK if options.quick else GPU_SHAPES
    if options.rows or options.vocab:
        vocabularies = options.vocab or (32_000, 128_256)
        shapes = tuple((rows, vocab) for vocab in vocabularies for rows in options.rows or (16,))
    for num_rows, vocab_size in shapes:
        if run.has_time(f"B={num_rows} V={vocab_size}"):
            measure(run, num_rows, vocab_size, getattr(torch, dtype))
    summary: dict[str, Any] = {}
    if run.device == "cpu" and not options.no_isas and not options.quick:
        summary["isa_us"] = instruction_sets()
    run.finish(**summary)
