# SPDX-License-Identifier: Apache-2.0
"""What the tests of the baselines share: tiny families, the exact law of a winner, chi-square."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import tiny_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.baselines import ReferenceStyleIVG, TunedPyTorchIVG, ValueModel
from ivg_fast.engine import Engine
from ivg_fast.models.value_head import ValueHeadModel
from ivg_fast.params import EngineConfig, SearchParams

PROVIDERS = {"reference_style": ReferenceStyleIVG, "tuned_pytorch": TunedPyTorchIVG}
PROMPTS = [[1, 2, 3, 4, 5], [4], [5, 2, 3]]
Winner = tuple[int, ...]


class Family:
    """Random tiny models and naive float64 measures of whole responses."""

    def __init__(self, vocab_size: int, name: str = "gpt2") -> None:
        self.name, self.vocab_size = name, vocab_size
        self.models = self.modules(torch.float32)
        generator = torch.Generator().manual_seed(9)
        self.head = torch.randn(vocab_size, 32, generator=generator) / 5
        self.eos = vocab_size - 1
        self.exact = self.modules(torch.float64)

    def modules(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        """New modules, always with the same weights."""
        return {
            role: tiny_model(self.name, vocab_size=self.vocab_size, seed=seed, dtype=dtype)
            for seed, role in enumerate(("base", "tuned", "untuned", "value"), 1)
        }

    def provider(self, name: str, eos: bool = True) -> ReferenceStyleIVG | TunedPyTorchIVG:
        value = ValueModel(self.models["value"].base_model, self.head)
        pair = self.models["tuned"], self.models["untuned"]
        eos_ids = [self.eos] if eos else []
        return PROVIDERS[name](self.models["base"], *pair, value, eos_token_ids=eos_ids)

    def engine(self) -> Engine:
        """On modules of its own, as it installs its attention in them."""
        roles = self.modules(torch.float32)
        head = torch.nn.Linear(*self.head.shape[::-1], bias=False)
        head.weight = torch.nn.Parameter(self.head.clone(), requires_grad=False)
        value = ValueHeadModel(roles.pop("value").base_model, head)
        config = EngineConfig(num_blocks=2000, num_threads=1)
        return Engine(roles.pop("base"), value=value, config=config, **roles)

    def logits(self, role: str, ids: Tensor) -> Tensor:
        """[B, S, V] of whole texts [B, S], from scratch."""
        if role == "value":
            hidden = self.exact[role].base_model(ids).last_hidden_state
            return hidden @ self.head.double().T
        return self.exact[role](ids).logits

    def combined(self, guidance: str, weight: float, ids: Tensor) -> Tensor:
        """[B, V] guided logits behind the texts."""
        z = self.logits("base", ids)[:, -1]
        if guidance == "implicit":
            pair = self.logits("tuned", ids)[:, -1] - self.logits("untuned", ids)[:, -1]
            return z + weight * pair
        return z + weight * self.logits("value", ids)[:, -1] if guidance == "explicit" else z

    def score(self, scorer: str, prompt_length: int, ids: Tensor) -> Tensor:
        """[B] scores of whole texts."""
        if scorer == "explicit":
            return self.logits("value", ids)[:, -2].gather(1, ids[:, -1:])[:, 0]
        targets = ids[:, 1:, None]
        tuned, untuned = (
            torch.log_softmax(self.logits(role, ids)[:, :-1], -1).gather(2, targets)[..., 0]
            for role in ("tuned", "untuned")
        )
        return (tuned - untuned)[:, prompt_length - 1 :].sum(1)


def winner_law(family: Family, params: SearchParams) -> dict[Winner, float]:
    """The exact law of the response to PROMPTS[0] for L = 1, T = 2, without EOS."""
    prompt, size = PROMPTS[0], family.eos + 1
    width, fanout = params.beam_width, params.num_candidates

    def law(ids: Tensor) -> Tensor:
        z = family.combined(params.guidance, params.guidance_weight, ids)
        return torch.softmax(z / params.temperature, -1)

    def score(rows: Tensor) -> Tensor:
        return family.score(params.scorer, len(prompt), rows)

    start = torch.tensor([prompt])
    firsts = torch.cat([start.repeat(size, 1), torch.arange(size)[:, None]], dim=1)
    first_law, first_score = law(start)[0].tolist(), score(firsts).tolist()
    seconds = torch.cat(
        [firsts.repeat_interleave(size, 0), torch.arange(size).repeat(size)[:, None]], dim=1
    )
    second_law, second_score = law(firsts), score(seconds).view(size, size)
    survivors: dict[Winner, float] = {}
    for pool in itertools.product(range(size), repeat=width * fanout):
        kept = tuple(sorted(pool, key=lambda y: -first_score[y])[:width])
        mass = 1.0
        for y in pool:
            mass *= first_law[y]
        survivors[kept] = survivors.get(kept, 0.0) + mass
    winners: dict[Winner, float] = {}
    for kept, mass in survivors.items():
        ends = [(float(second_score[y, e]), y, e) for y in set(kept) for e in range(size)]
        below = 0.0
        for value, y, e in sorted(ends):
            cumulative = 1.0
            for parent in kept:
                at_most = second_law[parent][second_score[parent] <= value].sum()
                cumulative *= float(at_most) ** fanout
            winners[(y, e)] = winners.get((y, e), 0.0) + mass * (cumulative - below)
            below = cumulative
    return winners


def chi_square_p(results: Sequence[Winner], law: dict[Winner, float]) -> float:
    """p-value of the observed responses; cells that expect fewer than 5 are pooled."""
    counts = {cell: results.count(cell) for cell in law}
    assert sum(counts.values()) == len(results)
    expected = {cell: mass * len(results) for cell, mass in law.items()}
    common_cells = [cell for cell, mean in expected.items() if mean >= 5]
    pairs = [(counts[cell], expected[cell]) for cell in common_cells]
    rare = [cell for cell in law if cell not in common_cells]
    rest = sum(expected[cell] for cell in rare)
    if rest > 1:
        pairs.append((sum(counts[cell] for cell in rare), rest))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in pairs)
    return _upper_tail(statistic, len(pairs) - 1)


def two_samples_p(some: Sequence[Winner], others: Sequence[Winner]) -> float:
    """p-value of two samples under one law, unknown; cells that expect fewer than 5 are pooled."""
    share = min(len(some), len(others)) / (len(some) + len(others))
    cells = [[some.count(c), others.count(c)] for c in {*some, *others}]
    rest = [0, 0]
    kept = []
    for a, b in cells:
        if (a + b) * share >= 5:
            kept.append([a, b])
        else:
            rest = [rest[0] + a, rest[1] + b]
    if sum(rest) * share >= 5:
        kept.append(rest)
    table = torch.tensor(kept, dtype=torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    return _upper_tail(float(((table - expected) ** 2 / expected).sum()), len(kept) - 1)


def _upper_tail(statistic: float, degrees: int) -> float:
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
