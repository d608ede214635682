# SPDX-License-Identifier: Apache-2.0
"""Models as transformers, PEFT and torch hand them over: adapters, quantised layers, arguments."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine_cases import Family, compare, fresh_seed, random_case, run_engine
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    Engine,
    EngineConfig,
    InvalidParameterError,
    SearchParams,
    UnsupportedModelError,
)
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.selftest import check_model

SEED = fresh_seed()
CONFIG = EngineConfig(num_blocks=200, num_threads=1)


def adapted(model: torch.nn.Module, seed: int = 3) -> Any:
    """A PEFT model whose low-rank factors are far from zero."""
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


class Adapted(Family):
    """A family whose tuned model is its untuned one under an adapter."""

    def roles(self) -> dict[str, torch.nn.Module]:
        roles = super().roles()
        options = {"vocab_size": self.vocab_size, "eos_token_id": self.eos_token_id}
        roles["untuned"] = tiny_model("llama", seed=self.seed + 1, **options)
        roles["tuned"] = adapted(tiny_model("llama", seed=self.seed + 1, **options))
        return roles


def test_an_adapted_model_in_hand() -> None:
    family = Adapted("gpt2", seed=SEED)
    rng = random.Random(SEED)
    cases = [
        random_case(rng, family, "implicit", "implicit"),
        random_case(rng, family, "none", "implicit", beam_width=2, num_candidates=2),
    ]
    naive = family.naive()
    assert isinstance(naive.tuned, peft.PeftModel)
    results = [case.solve(naive) for case in cases]
    with family.engine() as engine:
        outputs = run_engine(engine, cases)
        tuned = engine._runners["tuned"]
        assert tuned._can_keep, "all logits of a prompt are made, for one that is needed"
    found, _ = compare(outputs, results, cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)
    assert any(o.implicit_reward for output in outputs for o in output.outputs)
    assert tuned.model.get_base_model().config._attn_implementation != "ivg_paged"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A base model with its tokenizer, and an adapter without one."""
    paths = {name: tmp_path / name for name in ("base", "adapter", "pickled")}
    tiny_model("llama", seed=1).save_pretrained(paths["base"])
    tiny_tokenizer().save_pretrained(paths["base"])
    for name, is_safe in (("adapter", True), ("pickled", False)):
        model = adapted(tiny_model("llama", seed=1))
        model.peft_config["default"].base_model_name_or_path = str(paths["base"])
        model.save_pretrained(paths[name], safe_serialization=is_safe)
    return paths


def test_a_folder_of_an_adapter(folders: dict[str, Path]) -> None:
    params = SearchParams.eft(max_tokens=8, seed=5)
    in_hand = {
        "tuned": adapted(tiny_model("llama", seed=1)),
        "untuned": tiny_model("llama", seed=1),
    }
    with Engine(tiny_model("llama", seed=1), tiny_tokenizer(), **in_hand, config=CONFIG) as engine:
        (wanted,) = engine.generate("abc", params)
    with Engine.from_pretrained(
        folders["base"], folders["adapter"], folders["base"], config=CONFIG
    ) as engine:
        (output,) = engine.generate("abc", params)
    ((best,), (same,)) = output.outputs, wanted.outputs
    assert best.token_ids == same.token_ids
    assert best.implicit_reward == pytest.approx(same.implicit_reward, rel=1e-4)
    assert abs(best.implicit_reward) > 0.1
    # As a base it brings the tokenizer of the model that it adapts.
    with Engine.from_pretrained(folders["adapter"], config=CONFIG) as engine:
        assert engine.generate("abc", SearchParams(max_tokens=3))[0].prompt_token_ids == [
            65,
            66,
            67,
        ]


def test_pickled_adapters_are_not_opened(folders: dict[str, Path]) -> None:
    assert (folders["pickled"] / "adapter_model.bin").exists()
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        Engine.from_pretrained(folders["pickled"], config=CONFIG)


def test_adapters_that_add_virtual_tokens() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match="base: adapters of type PROMPT_TUNING"):
        Engine(model, config=CONFIG)


# --- quantised layers ----------------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """Weights in int8 with a scale a row, inputs as they are."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def weight_only(model: torch.nn.Module) -> torch.nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                setattr(parent, name, Int8Linear(child))
    return model


class WeightOnly(Family):
    def roles(self) -> dict[str, torch.nn.Module]:
        roles = super().roles()
        return {**roles, **{r: weight_only(roles[r]) for r in ("base", "tuned")}}


def test_weight_only_int8_layers() -> None:
    family = WeightOnly("llama", seed=SEED)
    rng = random.Random(SEED)
    cases = [random_case(rng, family, *cell) for cell in (("implicit", "explicit"), ("none",) * 2)]
    naive = family.naive()
    assert any(isinstance(module, Int8Linear) for module in naive.base.modules())
    with family.engine() as engine:
        outputs = run_engine(engine, cases)
    found, _ = compare(outputs, [case.solve(naive) for case in cases], cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)


def dynamic_int8(model: torch.nn.Module) -> torch.nn.Module:
    """Inputs are rounded too, by a scale of the whole batch."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)


def test_dynamically_quantised_layers() -> None:
    model = dynamic_int8(tiny_model("llama", seed=1))
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    roles = {"tuned": tiny_model("gpt2", seed=2), "untuned": tiny_model("gpt2", seed=3)}
    with Engine(model, tiny_tokenizer(), **roles, config=CONFIG) as engine:
        params = SearchParams.cbs(max_tokens=9, beam_width=2, num_candidates=2, chunk_length=3, n=4)
        outputs = engine.generate(["abc", "d"], params)
        engine.check_integrity()
    for output in outputs:
        for candidate in output.outputs:
            assert len(candidate.token_ids) == 9 or candidate.finish_reason == "stop"
            assert -100 < candidate.cumulative_logprob < 0
    # One prompt in a batch of its own is rounded as the model alone rounds it.
    stock = model(torch.tensor([[65, 66, 67]]), logits_to_keep=1).logits[0, -1]
    with Engine(model, config=CONFIG) as engine:
        greedy = SearchParams(max_tokens=1, temperature=0.0)
        (output,) = engine.generate([[65, 66, 67]], greedy)
    assert output.outputs[0].token_ids == [int(stock.argmax())]
    assert output.outputs[0].base_logprob == pytest.approx(
        float(stock.log_softmax(-1).max()), abs=1e-5
    )


def test_a_quantised_model_that_computes_otherwise_is_refused() -> None:
    """The tolerance is wide, but not so wide that a wrong position would fit."""
    runner = ModelRunner(dynamic_int8(tiny_model("llama", seed=1)), role="base")
    assert 1e-3 < check_model(runner) < 0.3
    call = runner._call

    def shifted(batch: Any, **options: Any) -> Any:
        return call(replace(batch, position_ids=batch.position_ids * 2), **options)

    runner._call = shifted
    with pytest.raises(UnsupportedModelError, match=r"deviation .*, at most 0\.3 expected"):
        check_model(runner)


# --- arguments of loading ------------------------------------------------------------------------


def test_arguments_for_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    inner = tmp_path / "repository" / "inner"
    tiny_model("llama", seed=1).save_pretrained(inner)
    tiny_tokenizer().save_pretrained(inner)
    kwargs = {"base": {"subfolder": "inner"}, "attn_implementation": "eager"}
    with Engine.from_pretrained(
        inner.parent, folders["base"], folders["base"], model_kwargs=kwargs, config=CONFIG
    ) as engine:
        assert engine.generate("abc", SearchParams(max_tokens=3))[0].prompt_token_ids == [
            65,
            66,
            67,
        ]
        assert [r.stock_attention for r in engine._runners.values()] == ["eager"] * 3


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_safetensors": False},
        {"trust_remote_code": True},
        {"weights_only": False},
        {"output_loading_info": False},
        {"dtype": "float16"},
        {"torch_dtype": torch.float16},
        {"device_map": "auto"},
        {"state_dict": {}},
        {"base": {"use_safetensors": False}},
        {"adapter_kwargs": {"use_safetensors": False}},
    ],
)
def test_arguments_that_may_not_be_set(folders: dict[str, Path], kwargs: dict[str, Any]) -> None:
    inner = next(iter(kwargs.values()))
    (name,) = inner if isinstance(inner, dict) and inner else kwargs
    with pytest.raises(InvalidParameterError, match=f"must leave {name} alone") as caught:
        Engine.from_pretrained(folders["base"], model_kwargs=kwargs, config=CONFIG)
    assert caught.value.parameter == "model_kwargs"


@pytest.mark.parametrize("kwargs", ["fast", {"value": {"revision": "main"}}, {"base": 5}])
def test_arguments_that_are_none(folders: dict[str, Path], kwargs: Any) -> None:
    with pytest.raises(InvalidParameterError, match="must be arguments by name") as caught:
        Engine.from_pretrained(folders["base"], model_kwargs=kwargs, config=CONFIG)
    assert json.dumps(kwargs).strip('"') in str(caught.value).replace("'", '"')


def test_device_and_dtype(folders: dict[str, Path]) -> None:
    with Engine.from_pretrained(
        folders["base"], device="cpu", dtype="bfloat16", config=CONFIG
    ) as engine:
        assert engine._runners["base"].dtype == torch.bfloat16
        assert engine.generate("abc", SearchParams(max_tokens=3))[0].outputs
    no_such = f"cuda:{torch.cuda.device_count()}"
    for device in (no_such, torch.device("meta"), "gpu"):
        with pytest.raises(InvalidParameterError, match=r"device must be .*, got"):
            Engine.from_pretrained(folders["base"], device=device, config=CONFIG)
    with pytest.raises(InvalidParameterError, match=r"dtype must be .*, got 'int8'"):
        Engine.from_pretrained(folders["base"], dtype="int8", config=CONFIG)
    with pytest.raises(InvalidParameterError, match="base must be on the CPU or a CUDA device"):
        Engine(tiny_model("llama").to("meta"), config=CONFIG)
