# SPDX-License-Identifier: Apache-2.0
"""Accuracies, intervals and paired differences of verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from bench.experiments.ifeval import Verdict
from bench.experiments.instruction_report import accuracy, figures, ratio_interval, render, table
from bench.experiments.instructions import Item, subset


def verdicts(rng: np.random.Generator, count: int, chance: float) -> list[Verdict]:
    made = []
    for _ in range(count):
        strict = rng.random(rng.integers(1, 4)) < chance
        loose = strict | (rng.random(len(strict)) < 0.2)
        made.append(Verdict(tuple(strict.tolist()), tuple(loose.tolist())))
    return made


def test_levels() -> None:
    found = table([Verdict((True, False), (True, True)), Verdict((True,), (True,))])
    assert accuracy(found["prompt_strict"]) == 1 / 2
    assert accuracy(found["instruction_strict"]) == 2 / 3
    assert accuracy(found["prompt_loose"]) == accuracy(found["instruction_loose"]) == 1


def test_intervals_cover() -> None:
    """Of 200 samples of 60 prompts about 95% of the intervals hold the truth; of a planted bug
    that resamples instructions as if each were a prompt, fewer."""
    rng = np.random.default_rng(0)
    hits, wrong = 0, 0
    for trial in range(200):
        # Instructions of a prompt are followed together: prompts are what varies.
        follow = rng.random(60) < 0.4
        counts = rng.integers(1, 6, 60)
        pair = np.array([follow * counts, counts], dtype=np.float64)
        low, high = ratio_interval(pair, seed=trial, draws=500)
        hits += low <= 0.4 <= high
        flat = np.repeat(follow, counts).astype(np.float64)
        low, high = ratio_interval(np.array([flat, np.ones(len(flat))]), seed=trial, draws=500)
        wrong += low <= 0.4 <= high
    assert 180 <= hits <= 199
    assert wrong < 172


def test_differences_are_paired() -> None:
    """Methods that agree on most prompts: a paired interval is far narrower than two apart."""
    rng = np.random.default_rng(1)
    base = verdicts(rng, 200, 0.5)
    ivg = [Verdict((True,) * len(v.strict), v.loose) if i < 10 else v for i, v in enumerate(base)]
    row = {"num_tokens": 3, "finish_reason": "stop", "seconds": 0.1, "forwarded": {"base": 5}}
    rows = {name: [row] * 200 for name in ("base", "ivg")}
    found = figures({"base": base, "ivg": ivg}, rows)
    gap = found["differences"]["ivg - base"]["prompt_strict"]
    ours, theirs = (found["methods"][name]["prompt_strict"] for name in ("ivg", "base"))
    assert gap["mean"] == pytest.approx(ours["mean"] - theirs["mean"])
    width = gap["interval_95"][1] - gap["interval_95"][0]
    apart = ours["interval_95"][1] - theirs["interval_95"][0] - gap["mean"]
    assert 0 < width < apart / 2

    summary = {
        **found, "num_prompts": 200, "num_in_file": 541, "subset_seed": 0, "setup": "recipe",
        "seed": 0, "versions": {"torch": "x"}, "command": "c", "recipe": None,
        "params": {
            "beam_width": 2, "num_candidates": 2, "chunk_length": 30, "temperature": 0.7,
            "top_k": 50, "guidance_weight": 1.0, "max_tokens": 9,
        },
    }  # fmt: skip
    text = "\n".join(render(summary))
    assert f"| ivg | {100 * ours['mean']:.1f} (" in text
    assert f"| ivg - base | {100 * gap['mean']:+.1f} (" in text


def test_subsets_grow() -> None:
    items = [Item(i, str(i)) for i in range(50)]
    small, large = subset(items, 10, 3), subset(items, 30, 3)
    assert set(small) < set(large)
    assert [item.index for item in large] == sorted(item.index for item in large)
    assert subset(items, 10, 4) != small
    assert subset(items, None, 0) == items
    with pytest.raises(ValueError, match="num_prompts"):
        subset(items, 51, 0)
