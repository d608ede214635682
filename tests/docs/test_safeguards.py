# SPDX-License-Identifier: Apache-2.0
"""docs/runtime_safeguards.md: every row names tests, and they exist; those that only it needs."""

from __future__ import annotations

import ast
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

import ivg_fast
from ivg_fast import (
    CapacityError,
    Engine,
    EngineConfig,
    InvalidParameterError,
    ScoreInput,
    ScorerError,
    SearchParams,
)
from ivg_fast.ops.guided_sample import guided_sample

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "runtime_safeguards.md"


def rows(page: str) -> list[list[str]]:
    """The cells of the tables' rows, heads and rules left out."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "checked" and set(row[0]) != {"-"}]


@cache
def functions(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def faults(page: str) -> list[str]:
    """Rows without a test, and tests that there are not."""
    found = []
    for row in rows(page):
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[-1])
        if len(row) != 4 or not named:
            found.append(f"no test: {row[0]}")
        for file, name in named:
            path = TESTS / file
            if not path.is_file() or name not in functions(path):
                found.append(f"{file}::{name}")
    return found


def test_every_row_has_its_tests() -> None:
    page = PAGE.read_text("utf-8")
    assert len(rows(page)) > 40
    assert faults(page) == []
    assert faults(page.replace("test_bad_params`", "test_bad_paramz`", 1)) != []
    assert faults(page.replace("`test_engine_errors.py::test_position_limit`", "", 1)) == []
    assert faults(page + "| a | b | c | `test_cli.py` |\n") == ["no test: a"]


def test_every_error_is_in_the_catalogue() -> None:
    raised = " ".join(row[1] for row in rows(PAGE.read_text("utf-8")))
    errors = [name for name in ivg_fast.__all__ if name.endswith("Error")]
    assert len(errors) > 7
    assert [name for name in errors if f"`{name}`" not in raised] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"num_blocks": 0},
        {"num_blocks": 2**31},
        {"kv_memory_fraction": 0.0},
        {"kv_memory_fraction": 1.1},
        {"kv_memory_fraction": math.nan},
        {"max_num_rows": 0},
        {"max_burst_steps": 0},
        {"max_burst_steps": 1.5},
        {"max_join_steps": -1},
        {"max_queued_requests": 0},
        {"max_prefill_tokens": 0},
        {"max_prompt_tokens": 0},
        {"num_threads": 0},
        {"num_threads": True},
        {"compile": 1},
        {"cuda_graphs": 0},
    ],
)
def test_bad_engine_config(fields: dict) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(InvalidParameterError) as caught:
        EngineConfig(**fields)
    assert caught.value.parameter == name
    assert repr(value) in str(caught.value)


def test_no_memory_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    before = model.config._attn_implementation
    monkeypatch.setattr("ivg_fast.kv_budget._available_memory", lambda: 10_000)
    with pytest.raises(CapacityError, match=r"0\.5 of the free memory is 5000 bytes, a KV block"):
        Engine(model, tiny_tokenizer())
    assert model.config._attn_implementation == before
    monkeypatch.setattr("ivg_fast.kv_budget._available_memory", lambda: 20_000_000)
    with Engine(model, tiny_tokenizer()) as engine:
        assert engine.generate("the cat", SearchParams(max_tokens=3))


def test_outputs_and_failures_of_an_error() -> None:
    def picky(inputs: list[ScoreInput]) -> list[float]:
        if inputs[0].prompt.startswith("bad"):
            raise LookupError(inputs[0].prompt)
        return [0.0] * len(inputs)

    params = SearchParams.best_of_n(2, max_tokens=4, scorer=picky, seed=1)
    prompts = ["good", "bad one", "fine", "bad two"]
    with Engine(tiny_model("gpt2"), tiny_tokenizer(), config=EngineConfig(num_blocks=30)) as engine:
        with pytest.raises(ScorerError, match="bad one") as caught:
            engine.generate(prompts, params)
        alone = engine.generate(["good", "fine"], params, seeds=[1, 2])
    error = caught.value
    assert [output is not None for output in error.outputs] == [True, False, True, False]
    assert error.outputs[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert {index: str(e).split()[-1] for index, e in error.failures.items()} == {
        1: "one",
        3: "two",
    }


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_an_invalid_row_is_marked(backend: str, bad: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    options = {"seeds": 1, "candidate_ids": [0, 1, 2], "positions": 0, "backend": backend}
    healthy = guided_sample(logits, **options)
    logits[1] = bad
    drawn = guided_sample(logits, **options)
    assert drawn.valid.tolist() == [True, False, True]
    assert drawn.token_ids[::2].tolist() == healthy.token_ids[::2].tolist()
