# SPDX-License-Identifier: Apache-2.0
"""Models through torch.compile: the same ids, no graph made twice, and what cannot be compiled."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import CELLS, Family, compare, fresh_seed, random_cases, run_engine
from test_engine_models import adapted, dynamic_int8
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    Engine,
    EngineConfig,
    InvalidParameterError,
    SearchParams,
    UnsupportedModelError,
)
from ivg_fast.models.runner import ModelRunner

SEED = fresh_seed()
CONFIG = EngineConfig(num_blocks=60, num_threads=1, compile=True)


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch) -> None:
    """Graphs are made as ever, and run operator by operator: no C++ compiler, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("traced")
def test_the_grid_in_graphs() -> None:
    """The naive search's ids; and after the warmup no request waits for a graph."""
    family = Family("mistral", seed=SEED, overrides={"num_hidden_layers": 1})
    naive = family.naive()
    cases = random_cases(random.Random(SEED), family, naive)
    assert len(cases) == len(CELLS)
    with family.engine(compile=True, max_burst_steps=8) as engine:
        engine.warmup()
        made = num_graphs()
        assert 4 <= made <= 4 * 4, "a graph for each role and form of batch"
        outputs = run_engine(engine, cases)
        run_engine(engine, cases[:1])
        assert num_graphs() == made
    found, num_near_ties = compare(outputs, [case.solve(naive) for case in cases], cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)
    assert num_near_ties <= 3


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("shape", ["opt", "gemma3", "gpt_oss", "mixtral", "adapted"])
def test_a_model_is_one_graph(shape: str) -> None:
    """The runner's own check compares compiled paged logits with stock ones."""
    model = adapted(tiny_model("llama")) if shape == "adapted" else tiny_model(shape)
    runner = ModelRunner(model, role="base", can_compile=True)
    assert num_graphs() == 1
    runner.close()


@pytest.mark.usefixtures("traced")
def test_models_have_graphs_of_their_own() -> None:
    """torch.compile keeps some graphs of one piece of code, and gives up behind them."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in range(1, 4):
            model = tiny_model("gpt2", n_layer=1, n_embd=4 * width)
            ModelRunner(model, role="base", can_compile=True).close()
    assert num_graphs() == 3


def test_compiled_code_gives_the_same_ids() -> None:
    """With the real compiler behind it, on a model of one layer."""
    model = tiny_model("gpt2", seed=SEED, n_layer=1)
    params = SearchParams(max_tokens=12, num_candidates=4, n=4)
    outputs = []
    for can_compile in (False, True):
        config = EngineConfig(num_blocks=60, num_threads=1, compile=can_compile)
        with Engine(model, tiny_tokenizer(), config=config) as engine:
            outputs.append(engine.generate("abc", params, seeds=[SEED]))
    for plain, compiled in zip(*outputs, strict=True):
        assert [o.token_ids for o in compiled.outputs] == [o.token_ids for o in plain.outputs]
        for a, b in zip(compiled.outputs, plain.outputs, strict=True):
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
    assert num_graphs() > 0


class _Prints(torch.nn.Module):
    """A layer that no graph can hold: it looks at a number on the host."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 1e9:
            x = x * 0
        return self.inner(x)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", ["host", "quantised"])
def test_what_cannot_be_compiled_is_refused(kind: str) -> None:
    model: Any = tiny_model("llama", seed=1)
    if kind == "host":
        model.lm_head = _Prints(model.lm_head)
    else:
        model = dynamic_int8(model)
    stock = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="base: LlamaForCausalLM cannot be compiled: "):
        Engine(model, tiny_tokenizer(), config=CONFIG)
    assert model.config._attn_implementation == stock
    with Engine(model, tiny_tokenizer(), config=EngineConfig(num_blocks=60)) as engine:
        assert engine.generate("abc", SearchParams(max_tokens=3))[0].outputs[0].token_ids


def test_a_value_on_the_trunk_is_not_compiled() -> None:
    with pytest.raises(InvalidParameterError, match="compile must be False where value shares"):
        Family("gpt2", seed=SEED, value="scalar trunk").engine(compile=True)


@pytest.mark.usefixtures("traced")
def test_a_graph_with_a_wrong_attention_is_refused(monkeypatch) -> None:
    """The control of the comparison above: the graph's operator at another scale."""
    from ivg_fast.models import attention

    traced = attention._traced

    def scaled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return traced(*args, **{**kwargs, "scaling": 2 * (kwargs.get("scaling") or 0.35)})

    monkeypatch.setattr(attention, "_traced", scaled)
    with pytest.raises(UnsupportedModelError, match="computes other logits on the paged cache"):
        ModelRunner(tiny_model("llama"), role="base", can_compile=True)
