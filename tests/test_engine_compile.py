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
from tiny_models import TINY_MODELS, tiny_model, tiny_tokenizer

from ivg_fast import Engine, EngineConfig, SearchParams, UnsupportedModelError
from ivg_fast.models.runner import ModelRunner

SEED = fresh_seed()
CONFIG = EngineConfig(num_blocks=60, num_threads=1, compile=True)


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch) -> None:
    """Graphs are made as ever, and run operator by operator: no C++ compiler, which takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("shape", ["gpt2", "mistral"])
def test_the_grid_in_graphs(shape: str) -> None:
    family = Family(shape, seed=SEED)
    naive = family.naive()
    cases = random_cases(random.Random(f"{SEED} {shape}"), family, naive)
    assert len(cases) == len(CELLS)
    with family.engine(compile=True, max_burst_steps=8) as engine:
        outputs = run_engine(engine, cases)
    found, num_near_ties = compare(outputs, [case.solve(naive) for case in cases], cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)
    assert num_near_ties <= 3


@pytest.mark.usefixtures("traced")
def test_after_warmup_no_graph_is_made() -> None:
    family = Family("gpt2", seed=SEED)
    cases = random_cases(random.Random(SEED), family, family.naive())
    with family.engine(compile=True, max_burst_steps=8) as engine:
        engine.warmup()
        before = num_graphs()
        run_engine(engine, cases)
        for case in cases:
            run_engine(engine, [case])
        assert num_graphs() == before
    assert 4 <= before <= 4 * 4, "a graph for each role and form of batch"


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("shape", TINY_MODELS)
def test_every_shape_is_one_graph(shape: str) -> None:
    """The runner's own check compares compiled paged logits with stock ones."""
    runner = ModelRunner(tiny_model(shape), role="base", can_compile=True)
    assert num_graphs() == 1
    runner.close()


@pytest.mark.usefixtures("traced")
def test_adapted_models_compile() -> None:
    models = [tiny_model("llama", seed=1), adapted(tiny_model("llama", seed=1))]
    guides = {"tuned": models[1], "untuned": tiny_model("llama", seed=1)}
    params = SearchParams.eft(max_tokens=6, seed=1)
    outputs = []
    for config in (CONFIG, EngineConfig(num_blocks=60, num_threads=1)):
        with Engine(models[0], tiny_tokenizer(), **guides, config=config) as engine:
            outputs += engine.generate("abc", params)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


@pytest.mark.usefixtures("traced")
def test_many_engines_have_graphs_of_their_own() -> None:
    """torch.compile keeps eight graphs of one piece of code, and would then give up."""
    for width in range(1, 11):
        model = tiny_model("gpt2", n_layer=1, n_embd=4 * width)
        ModelRunner(model, role="base", can_compile=True).close()
    assert num_graphs() == 10


def test_compiled_code_gives_the_same_ids() -> None:
    """With the real compiler behind it, on a model of one layer."""
    model = tiny_model("gpt2", seed=SEED, n_layer=1)
    params = SearchParams.cbs(
        max_tokens=12,
        beam_width=2,
        num_candidates=2,
        chunk_length=3,
        scorer=lambda inputs: [sum(item.token_ids) % 31 for item in inputs],
        n=4,
    )
    outputs = []
    for can_compile in (False, True):
        config = EngineConfig(num_blocks=60, num_threads=1, compile=can_compile)
        with Engine(model, tiny_tokenizer(), config=config) as engine:
            outputs.append(engine.generate(["abc", "de"], params, seeds=[1, 2]))
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
