# SPDX-License-Identifier: Apache-2.0
"""The methods of the sentiment experiment, and the rule that chooses a weight."""

from __future__ import annotations

from typing import Any

import pytest

from bench.experiments.experiment import Settings
from bench.experiments.families import SPLITS, load_prompts
from bench.experiments.methods import (
    choose_weight,
    choose_weights,
    main_methods,
    method,
    search_sweep,
    weight_methods,
)
from ivg_fast.errors import InvalidParameterError
from ivg_fast.templates import preset

ROWS: list[dict[str, Any]] = [
    {"method": "base", "weight": None, "gold": 0.0, "distinct_2": 1.0},
    {"method": "eft", "weight": 0.5, "gold": 3.0, "distinct_2": 0.95},
    {"method": "eft", "weight": 1.0, "gold": 5.0, "distinct_2": 0.9},
    {"method": "eft", "weight": 2.0, "gold": 9.0, "distinct_2": 0.92},
    {"method": "ivg", "weight": 0.5, "gold": 8.0, "distinct_2": 0.85},
    {"method": "ivg", "weight": 1.0, "gold": 9.0, "distinct_2": 0.89},
    {"method": "ivg", "weight": 2.0, "gold": 9.5, "distinct_2": 0.7},
    {"method": "args", "weight": 0.5, "gold": 2.0, "distinct_2": 0.99},
    {"method": "args", "weight": 1.0, "gold": 1.0, "distinct_2": 0.99},
    {"method": "args", "weight": 2.0, "gold": 7.0, "distinct_2": 0.5},
]


def test_the_rule() -> None:
    assert choose_weight(ROWS, "eft", 0.9) == 2.0  # the highest reward that repeats little
    assert choose_weight(ROWS, "args", 0.9) == 0.5
    assert choose_weight(ROWS, "ivg", 0.9) == 1.0  # none passes: the most varied one
    assert choose_weight(ROWS, "args", 0.5) == 2.0


def test_the_wide_grid_is_beside_the_narrow_one() -> None:
    chosen = choose_weights(ROWS, [0.5, 1.0], 0.9)
    assert chosen == {
        "eft": 1.0,
        "args": 0.5,
        "ivg": 1.0,
        "eft_wide": 2.0,
        "args_wide": 0.5,
        "ivg_wide": 1.0,
    }
    names = [m.name for m in main_methods(chosen)]
    assert names == [
        "base",
        "best_of_16",
        "eft",
        "args",
        "cbs_implicit",
        "cbs_explicit",
        "ivg",
        "eft_wide",
    ]
    weights = {m.name: m.weight for m in main_methods(chosen)}
    assert (weights["eft"], weights["eft_wide"], weights["base"]) == (1.0, 2.0, None)


def test_methods_are_the_papers() -> None:
    assert method("ivg", 1.0).params == preset("imdb").params
    args = method("args", 2.0).params
    assert (args.guidance, args.scorer, args.pool_size) == ("explicit", "none", 1)
    assert method("cbs_implicit").params.scorer == "implicit"
    best = method("best_of_16").params
    assert (best.pool_size, best.chunk_length, best.scorer) == (16, None, "explicit")
    with pytest.raises(ValueError, match="needs a weight"):
        method("eft")


def test_sweeps_hold_each_setting_once() -> None:
    swept = search_sweep(0.5)
    params = [m.params for m in swept]
    assert len(set(params)) == len(params) == 2 * (4 + 3 + 6 - 2)
    assert method("ivg", 0.5).params in params
    shapes = {(p.beam_width, p.num_candidates, p.chunk_length) for p in params}
    assert {(1, 4, 5), (8, 4, 5), (4, 8, 5), (4, 4, 1), (4, 4, None)} <= shapes
    weights = [(m.name, m.weight) for m in weight_methods([1.0, 0.5])]
    assert weights[:3] == [("base", None), ("eft", 0.5), ("eft", 1.0)]
    assert len(weights) == 7


def test_shipped_prompts_keep_dev_and_test_apart(tmp_path) -> None:
    splits = load_prompts()
    assert len(splits["test"].texts) >= 200
    assert not set(splits["dev"].texts) & set(splits["test"].texts)
    with pytest.raises(InvalidParameterError, match="number of test prompts"):
        splits["test"].first(10**6)
    file = tmp_path / "prompts.jsonl"
    rows = [f'{{"split": "{split}", "prompt": "The same film"}}\n' for split in SPLITS]
    file.write_text("".join(rows))
    with pytest.raises(InvalidParameterError, match="must not be in both"):
        load_prompts(str(file))
    rows = ['{"split": "dev", "prompt": "a", "gist": "g", "value": "v"}\n']
    file.write_text("".join([*rows, '{"split": "test", "prompt": "b"}\n']))
    prompts = load_prompts(str(file))["dev"]
    assert (prompts.references, prompts.value_texts) == ({"a": "g"}, {"a": "v"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_prompts", 0),
        ("num_judged", -1),
        ("batch_size", 0),
        ("num_threads", 0),
        ("seeds", ()),
        ("seeds", (0, 1, 0)),
        ("weights", ()),
        ("weights", (0.5, -1.0)),
        ("wide_weights", (float("nan"),)),
        ("min_distinct", 1.5),
    ],
)
def test_settings_that_no_run_can_have(name: str, value: Any) -> None:
    Settings(num_prompts=1, seeds=(5,), weights=(0.5,), wide_weights=(), min_distinct=0)
    with pytest.raises(InvalidParameterError, match=rf"^{name} must .*got "):
        Settings(**{name: value})
