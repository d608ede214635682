# SPDX-License-Identifier: Apache-2.0
"""Modules in faster forms: the same function, and no trace of them afterwards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from ivg_fast.errors import UnsupportedModelError
from ivg_fast.models import fast_modules, runner
from ivg_fast.models.fast_modules import FastModules
from ivg_fast.models.runner import ModelRunner


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


def test_the_self_test_compares_with_the_stock_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a wrong GELU. A self-test that ran it on both sides would find them equal."""
    monkeypatch.setattr(fast_modules, "_gelu_tanh", lambda x: torch.relu(x))
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="deviation"):
        runner.ModelRunner(model, role="base")
    assert not own_forwards(model)
