# SPDX-License-Identifier: Apache-2.0
"""Random and adversarial inputs of guided_sample, and a run of the contract over them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from sampling_contract import Row, is_drawable, violation
from torch import Tensor

from ivg_fast.ops.guided_sample import guided_sample, guided_sample_ref
from ivg_fast.ops.philox import uniform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (
    *("normal", "normal", "ties", "all equal", "runs of -inf", "nearly all -inf", "one finite"),
    *("nan", "inf", "peaked"),
)


@dataclass
class Case:
    logits: tuple[Tensor, Tensor | None, Tensor | None]
    arguments: dict[str, Any]


def make_logits(
    rng: random.Random, num_rows: int, vocab_size: int, dtype: torch.dtype, device: str
) -> Tensor:
    x = torch.randn(num_rows, vocab_size) * rng.choice([1e-6, 1, 3, 30, 1e4, 1e30])
    kind = rng.choice(KINDS)
    row = rng.randrange(num_rows)
    column = rng.randrange(vocab_size)
    if kind == "ties":
        x = (torch.randn(num_rows, vocab_size) * 3).round()
    elif kind == "all equal":
        x[:] = rng.choice([0.0, 1.0, -3.0])
    elif kind == "runs of -inf":
        x[:, column : column + rng.randrange(vocab_size)] = -torch.inf
    elif kind == "nearly all -inf":
        x[torch.rand(num_rows, vocab_size) < 0.99] = -torch.inf
    elif kind == "one finite":
        x[:] = -torch.inf
        x[:, column] = 1.0
    elif kind == "nan":
        x[row, column] = torch.nan
    elif kind == "inf":
        x[row, column] = torch.inf
    elif kind == "peaked":
        x[:, column] = x[x.isfinite()].max() + 5
    x = x.to(dtype)
    if rng.random() < 0.3:  # rows apart, and off every alignment
        wide = torch.zeros(num_rows, vocab_size + 7, dtype=dtype)
        wide[:, 3 : 3 + vocab_size] = x
        return wide.to(device)[:, 3 : 3 + vocab_size]
    return x.to(device)


def make_case(rng: random.Random, vocab_size: int, num_samples: int, device: str = "cpu") -> Case:
    num_rows = rng.choice([1, 2, 5])
    num_given = rng.choice([1, 2, 3, 3, 3])
    logits = [
        make_logits(rng, num_rows, vocab_size, rng.choice(DTYPES), device)
        if i < num_given
        else None
        for i in range(3)
    ]

    def draw(options: list[float], dtype: torch.dtype) -> Tensor:
        values = torch.tensor([rng.choice(options) for _ in range(num_samples)], dtype=dtype)
        return (values[:1].repeat(num_samples) if is_uniform else values).to(device)

    is_uniform = rng.random() < 0.3
    some_k = [0, 0, -1, 1, 2, 50, 1000, vocab_size - 1, vocab_size, vocab_size + 5]
    arguments = {
        "weight": draw([1, 1, 0, -0.5, 0.3, 2], torch.float32),
        "temperature": draw([0, 1, 1, 0.7, 2.5, 0.1], torch.float32),
        "top_k": draw(some_k, torch.int64),
        "top_p": draw([1, 1, 0.9, 0.5, 0.99, 1e-3], torch.float32),
        "min_p": draw([0, 0, 0.1, 0.01, 1], torch.float32),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_samples,)).to(device),
        "candidate_ids": torch.randint(0, 2**31 - 1, (num_samples,), dtype=torch.int32).to(device),
        "positions": torch.randint(0, 3000, (num_samples,), dtype=torch.int32).to(device),
        "logit_rows": torch.randint(0, num_rows, (num_samples,)).sort().values.to(device),
        "banned_ids": torch.randint(-1, vocab_size, (num_samples, 2)).to(device),
        "banned_until": torch.randint(0, 3000, (num_samples,)).to(device),
    }
    return Case((logits[0], logits[1], logits[2]), arguments)


def rows_of(case: Case) -> list[Row]:
    given = {name: values.cpu() for name, values in case.arguments.items()}
    u = uniform(given["seeds"], given["candidate_ids"], given["positions"])
    rows = []
    for i, row in enumerate(given["logit_rows"].tolist()):
        base, tuned, untuned = (None if x is None else x[row].cpu().double() for x in case.logits)
        is_banning = given["positions"][i] < given["banned_until"][i]
        rows.append(
            Row(
                base,
                tuned,
                untuned,
                float(u[i]),
                float(given["weight"][i]),
                float(given["temperature"][i]),
                max(int(given["top_k"][i]), 0),
                float(given["top_p"][i]),
                float(given["min_p"][i]),
                tuple(t for t in given["banned_ids"][i].tolist() if t >= 0 and is_banning),
            )
        )
    return rows


@dataclass
class Report:
    violations: list[str]
    num_samples: int = 0
    num_differ: int = 0
    """Valid samples whose id is not that of the float64 reference."""


def run_cases(
    backend: str,
    seed: int,
    vocab_sizes: list[int],
    num_samples: tuple[int, ...] = (0, 1, 3, 8),
    device: str = "cpu",
) -> Report:
    """Draw each case by `backend` and hold every sample against the contract."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    report = Report([])
    for vocab_size in vocab_sizes:
        case = make_case(rng, vocab_size, rng.choice(num_samples), device)
        got = guided_sample(*case.logits, **case.arguments, backend=backend)
        reference = guided_sample_ref(*case.logits, **case.arguments)
        for i, row in enumerate(rows_of(case)):
            report.num_samples += 1
            token = int(got.token_ids[i])
            problem = None
            if bool(got.valid[i]) != is_drawable(row) or bool(got.valid[i]) != (token >= 0):
                problem = f"valid is {bool(got.valid[i])}, token {token}"
            elif token >= 0:
                problem = violation(row, token)
                report.num_differ += token != int(reference.token_ids[i])
            elif not bool(got.logprob[i].isnan()):
                problem = "a measure of no token"
            if problem:
                report.violations.append(f"seed {seed}, V {vocab_size}, sample {i}: {problem}")
    return report
