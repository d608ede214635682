# SPDX-License-Identifier: Apache-2.0
"""`python -m bench ops`: guided_sample and token_logprobs against plain PyTorch, side by side.

"read" is a plain read of the logits (torch.sum of each tensor): the least that any sampler pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import torch_samplers as plain
from bench.harness import Call, Record, captured, compare, print_records, print_summary, write_csv
from ivg_fast import _C
from ivg_fast.ops.guided_sample import guided_sample
from ivg_fast.ops.philox import uniform
from ivg_fast.ops.token_logprobs import pair_token_logprobs

OURS = "ivg_fast"
WEIGHT, TEMPERATURE = 1.0, 0.7
ISAS = ("avx512", "avx2", "baseline")


class Batch:
    """Random logits of B rows and V columns, and the addresses of their draws."""

    def __init__(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.logits = tuple(
            (torch.randn(num_rows, vocab_size, device=device) * 3).to(dtype) for _ in range(3)
        )
        self.index: dict[str, Any] = {
            "seeds": torch.arange(num_rows, device=device),
            "candidate_ids": torch.arange(num_rows, device=device, dtype=torch.int32),
            "positions": torch.full((num_rows,), 7, device=device, dtype=torch.int32),
        }
        self.u = uniform(**self.index).float()
        self.x = f"B={num_rows} V={vocab_size}"
        self.config = f"{str(dtype)[6:]}, three tensors, T {TEMPERATURE}, weight {WEIGHT}"

    def ours(self, **setting: Any) -> Call:
        arguments = {"weight": WEIGHT, "temperature": TEMPERATURE, **setting, **self.index}
        return lambda: guided_sample(*self.logits, **arguments)

    def theirs(self, sampler: Any, *arguments: Any) -> Call:
        return lambda: sampler(*self.logits, WEIGHT, TEMPERATURE, *arguments)

    def read(self) -> list[Tensor]:
        return [x.sum() for x in self.logits]


def with_graph(providers: dict[str, Call], device: str) -> dict[str, Call]:
    if device == "cuda":
        providers[f"{OURS}, in a graph"] = captured(providers[OURS])
    return providers


def unfiltered(batch: Batch, device: str, num_rounds: int, is_cold: bool) -> list[Record]:
    compiled = torch.compile(plain.hierarchical, dynamic=False)
    providers = {
        OURS: batch.ours(),
        "multinomial chain": batch.theirs(plain.multinomial),
        "cumsum + searchsorted": batch.theirs(plain.inverse_cdf, batch.u),
        "torch.compile, hierarchical": batch.theirs(compiled, batch.u),
        "read": batch.read,
    }
    return compare(
        "guided_sample",
        batch.x,
        with_graph(providers, device),
        config=batch.config,
        device=device,
        num_rounds=num_rounds,
        is_cold=is_cold,
    )


def filtered(batch: Batch, device: str, num_rounds: int, is_cold: bool) -> list[Record]:
    records = []
    for name, top_k, top_p in (("top-k 50", 50, 1.0), ("top-p 0.9", 0, 0.9), ("both", 50, 0.9)):
        providers = {
            OURS: batch.ours(top_k=top_k, top_p=top_p),
            "sort chain": batch.theirs(plain.sorted_filters, top_k, top_p),
        }
        if name == "top-k 50":
            providers["torch.topk chain"] = batch.theirs(plain.topk_filter, top_k)
        records += compare(
            f"guided_sample, {name}",
            batch.x,
            with_graph(providers, device),
            config=batch.config,
            device=device,
            num_rounds=num_rounds,
            is_cold=is_cold,
        )
    return records


def scoring(batch: Batch, device: str, num_rounds: int, is_cold: bool) -> list[Record]:
    _, tuned, untuned = batch.logits
    ids = torch.arange(len(tuned), device=device)

    def log_softmax() -> Tensor:
        difference = tuned.float().log_softmax(1) - untuned.float().log_softmax(1)
        return difference.gather(1, ids[:, None])

    providers = {
        OURS: lambda: pair_token_logprobs(tuned, untuned, ids),
        "log_softmax and gather": log_softmax,
        "read": lambda: [tuned.sum(), untuned.sum()],
    }
    return compare(
        "pair_token_logprobs",
        batch.x,
        with_graph(providers, device),
        config=batch.config,
        device=device,
        num_rounds=num_rounds,
        is_cold=is_cold,
    )


def instruction_sets(num_rounds: int) -> dict[str, float]:
    """Median microseconds of each instruction set at B=16, V=32,000, processes taking turns."""
    times: dict[str, list[float]] = {}
    for _ in range(3):
        for isa in ISAS:
            command = [sys.executable, "-m", "bench", "ops", "--isa-child", str(num_rounds)]
            environment = {**os.environ, "IVG_FAST_CPU_ISA": isa}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if "lacks that instruction set" in done.stderr:
                continue
            if done.returncode:
                raise RuntimeError(done.stderr)
            times.setdefault(isa, []).append(json.loads(done.stdout.splitlines()[-1]))
    return {isa: statistics.median(each) for isa, each in times.items()}


def ratios(records: list[Record]) -> dict[str, float]:
    own = {(r.kernel, r.x): r.y_50 for r in records if r.provider == OURS}
    return {
        f"{r.kernel} {r.x}: {r.provider} / {OURS}": round(r.y_50 / own[r.kernel, r.x], 3)
        for r in records
        if r.provider != OURS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--warm", action="store_true", help="leave the caches as they are")
    parser.add_argument("--no-isas", action="store_true", help="skip the instruction sets")
    parser.add_argument("--out", type=Path, default=None, help="a CSV file")
    parser.add_argument("--isa-child", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    common = (device, arguments.rounds, not arguments.warm)
    if arguments.isa_child:
        batch = Batch(16, 32_000, torch.float32, "cpu")
        record = compare("isa", batch.x, {OURS: batch.ours()}, config="", num_rounds=100)
        print(record[0].y_50)
        return
    records: list[Record] = []
    for vocab_size in arguments.vocab:
        for num_rows in arguments.rows or ([1, 16] if device == "cpu" else [1, 16, 64, 256]):
            batch = Batch(num_rows, vocab_size, dtype, device)
            for part in (unfiltered, filtered, scoring):
                found = part(batch, *common)
                print_records(found, OURS)
                records += found
    summary: dict[str, Any] = {"isa": _C.cpu_isa(), "device": records[0].device}
    summary["ratios"] = ratios(records)
    if device == "cpu" and not arguments.no_isas:
        summary["isa_us"] = instruction_sets(arguments.rounds)
    if arguments.out:
        write_csv(arguments.out, records)
    print_summary(summary)
