# SPDX-License-Identifier: Apache-2.0
"""Modules in faster forms: the same function, and no trace of them afterwards."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from ivg_fast.errors import UnsupportedModelError
from ivg_fast.models import fast_modules, runner
from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch
from ivg_fast.models.fast_linear import FastLinear
from ivg_fast.models.fast_modules import FastModules
from ivg_fast.models.runner import ModelRunner


def count_calls(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> list[str]:
    """A list that grows with each call of the method."""
    calls: list[str] = []
    method = getattr(cls, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, counted)
    return calls


def own_forwards(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def outputs(model: torch.nn.Module, rows: int, length: int) -> torch.Tensor:
    ids = torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 7)])
@pytest.mark.parametrize("can_pack", [True, False])
def test_the_same_function(name: str, shape: tuple[int, int], can_pack: bool) -> None:
    """Against float64, packed and unpacked layers round about alike."""
    model = tiny_model(name)
    exact = outputs(model.double(), *shape)
    stock = outputs(model.float(), *shape)
    fast = FastModules(model, can_pack=can_pack)
    assert own_forwards(model) == []
    fast.install()
    num_changed = sum("mlp" in n or "attn" in n for n in own_forwards(model))
    assert num_changed >= 4 * model.config.num_hidden_layers * (can_pack or name == "gpt2")
    error = (outputs(model, *shape) - exact).abs().max()
    assert error <= 2 * (stock - exact).abs().max() + 1e-7
    fast.remove()
    fast.remove()
    assert own_forwards(model) == []
    assert torch.equal(outputs(model, *shape), stock)


def test_where_it_does_not_pay_linear_layers_stay() -> None:
    model = tiny_model("llama")
    FastModules(model, can_pack=False).install()
    assert own_forwards(model) == []
    bfloat16 = tiny_model("llama", dtype=torch.bfloat16)
    FastModules(bfloat16, can_pack=True).install()
    assert own_forwards(bfloat16) == []


def test_a_large_model_is_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert fast_modules.packing_pays(model)
    monkeypatch.setattr(fast_modules, "MAX_PACKED_BYTES", 1000)
    FastModules(model).install()
    assert own_forwards(model) == []


def test_a_runner_has_them_while_it_lives() -> None:
    model = tiny_model("gpt2")
    first, second = (ModelRunner(model, role=role) for role in ("tuned", "untuned"))
    assert own_forwards(model)
    assert not any(second._fast_modules._forwards.values())  # nothing is packed twice
    first.close()
    assert not own_forwards(model)
    second.use_attention("ivg_paged")
    assert own_forwards(model)
    second.close()
    assert not own_forwards(model)


def paged_logits(runner_: ModelRunner, num_tokens: int) -> torch.Tensor:
    """Of tokens 1, 2, ... as one prompt."""
    blocks = -(-num_tokens // BLOCK_SIZE)
    runner_.allocate(blocks)
    batch = ForwardBatch.from_host(
        input_ids=np.arange(1, num_tokens + 1),
        position_ids=np.arange(num_tokens),
        slot_mapping=np.arange(num_tokens),
        query_start_loc=np.array([0, num_tokens]),
        prompt_lens=np.array([num_tokens]),
        response_lens=np.array([0]),
        response_block_start=np.array([blocks]),
        block_table=np.arange(blocks)[None],
        logit_positions=np.arange(num_tokens),
    )
    return runner_.forward(batch)


@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize("can_pack", [True, False])
@pytest.mark.parametrize("options", [{}, {"scale_attn_by_inverse_layer_idx": True}])
def test_a_whole_block(
    num_tokens: int, can_pack: bool, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 and its blocks run whole, and are the same function."""
    monkeypatch.setattr(fast_modules, "packing_pays", lambda _: can_pack)
    model = tiny_model("gpt2", **options)
    ids = torch.arange(1, num_tokens + 1)[None]
    with torch.inference_mode():
        exact = model.double()(ids).logits[0]
        stock = model.float()(ids).logits[0]
    inner = count_calls(monkeypatch, type(model.transformer.h[0].mlp), "forward")
    outer = count_calls(monkeypatch, type(model.transformer), "forward")
    with closing(ModelRunner(model, role="base", self_test=False)) as runner_:
        inner.clear()  # probing the model runs it piece by piece
        outer.clear()
        error = (paged_logits(runner_, num_tokens) - exact).abs().max()
        assert inner == outer == []
        assert error <= 2 * (stock - exact).abs().max() + 1e-6


INSIDE = ("mlp", "mlp.c_fc", "attn", "attn.c_attn", "ln_1")


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(
    "name", [*(f"h.0.{name}" for name in INSIDE), "h.0", "drop", "wte", "ln_f"]
)
def test_hooks_inside_run(kind: str, name: str) -> None:
    """One who steers by hooks must not be passed over, whenever the hook comes and goes."""
    model = tiny_model("gpt2")
    with closing(ModelRunner(model, role="base")) as runner_:
        before = paged_logits(runner_, 5)
        ran = []
        module = model.transformer.get_submodule(name)
        hook = getattr(module, kind)(lambda *_: ran.append(name))
        torch.testing.assert_close(paged_logits(runner_, 5), before)
        assert ran == [name]
        hook.remove()
        paged_logits(runner_, 5)
        assert ran == [name]


def test_another_block_than_that_of_gpt2_stays() -> None:
    """Cross attention, another activation, or a layer of somebody else's."""
    crossed = tiny_model("gpt2", add_cross_attention=True)
    other_act = tiny_model("gpt2", activation_function="relu")
    replaced = tiny_model("gpt2")
    for block in replaced.transformer.h:
        block.mlp.c_fc = torch.nn.Sequential(block.mlp.c_fc)
    for model in (crossed, other_act, replaced):
        FastModules(model).install()
        assert not any("forward" in vars(block) for block in model.transformer.h)
    plain = tiny_model("gpt2")
    FastModules(plain).install()
    assert all("forward" in vars(block) for block in plain.transformer.h)


def test_the_self_test_compares_with_the_stock_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a wrong GELU. A self-test that ran it on both sides would find them equal."""
    monkeypatch.setattr(FastLinear, "gelu", lambda linear, x: torch.relu(linear(x)))
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="deviation"):
        runner.ModelRunner(model, role="base")
    assert not own_forwards(model)
