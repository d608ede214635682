# SPDX-License-Identifier: Apache-2.0
"""The load-time self-test: passes what is right, refuses planted mistakes and unserved families."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from engine_cases import CLASSIFIERS, classifier
from tiny_models import TINY_MODELS, redraw_weights, tiny_config, tiny_model

from ivg_fast.errors import UnsupportedModelError
from ivg_fast.models import attention
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.selftest import check_model
from ivg_fast.models.support import max_position
from ivg_fast.models.value_head import ValueHeadModel, as_value_model
from ivg_fast.ops.paged_attention import AttentionMetadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_passes(name: str, dtype: torch.dtype) -> None:
    runner = ModelRunner(tiny_model(name, dtype=dtype), role="base", self_test=False)
    deviation = check_model(runner)
    assert deviation < (5e-6 if dtype == torch.float32 else 0.03)
    assert runner.num_blocks == 0
    assert runner.config._attn_implementation == attention.ATTENTION_NAME


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Lets `change` alter the keywords of each paged attention call."""
    honest = attention.paged_attention_prepared

    def planted(*args: Any, **kwargs: Any) -> torch.Tensor:
        return honest(*args, **change(kwargs))

    monkeypatch.setattr(attention, "paged_attention_prepared", planted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [8, 50])
def test_catches_a_lost_window(monkeypatch, window: int, dtype: torch.dtype) -> None:
    """Also a window longer than the test's texts, and in bfloat16."""
    model = tiny_model("mistral", sliding_window=window, dtype=dtype)
    ModelRunner(model, role="base").close()
    plant(monkeypatch, lambda kwargs: kwargs | {"sliding_window": None})
    with pytest.raises(UnsupportedModelError, match=r"tuned: model type 'mistral'.*deviation"):
        ModelRunner(model, role="tuned")
    assert model.config.sliding_window == window
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", lambda kwargs: kwargs | {"sliding_window": kwargs["sliding_window"] + 1}),
        ("gemma2", lambda kwargs: kwargs | {"soft_cap": None}),
        ("gpt_oss", lambda kwargs: kwargs | {"sinks": None}),
        ("llama", lambda kwargs: kwargs | {"scale": kwargs["scale"] * 1.1}),
    ],
    ids=["window", "soft_cap", "sinks", "scale"],
)
def test_catches_a_wrong_option(monkeypatch, name: str, change: Any) -> None:
    plant(monkeypatch, change)
    with pytest.raises(UnsupportedModelError, match=f"'{name}' computes other logits"):
        ModelRunner(tiny_model(name), role="base")


def test_catches_a_wrong_position() -> None:
    """A model whose packed positions are off by one where a response starts."""
    model = tiny_model("gpt2")
    stock = model.forward

    def shifted(input_ids, position_ids, **kwargs):
        is_packed = bool((position_ids.diff() != 1).any())
        return stock(input_ids, position_ids=position_ids + (1 if is_packed else 0), **kwargs)

    shifted.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    model.forward = shifted
    with pytest.raises(UnsupportedModelError, match="computes other logits"):
        ModelRunner(model, role="base")


def test_catches_a_read_of_the_hole(monkeypatch) -> None:
    """Response keys looked for right after the prompt's blocks."""
    honest = AttentionMetadata.build

    def planted(**rows: torch.Tensor):
        rows["response_block_start"] = (rows["prompt_lens"] + 15) // 16
        return honest(**rows)

    monkeypatch.setattr(AttentionMetadata, "build", planted)
    with pytest.raises(UnsupportedModelError, match="computes other logits"):
        ModelRunner(tiny_model("llama"), role="base")


def test_catches_nan() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(UnsupportedModelError, match="deviation nan"):
        ModelRunner(model, role="base")


def test_a_short_model_is_tested_within_its_positions() -> None:
    runner = ModelRunner(tiny_model("gpt2", n_positions=12), role="base")
    assert runner.max_position == 12


def test_value_head_is_tested_through_its_head() -> None:
    backbone = tiny_model("gemma2").model
    head = torch.nn.Linear(32, 97, bias=False)
    runner = ModelRunner(ValueHeadModel(backbone, head), role="value")
    assert check_model(runner) < 5e-6


def test_a_head_of_zeros_passes() -> None:
    """As training starts with it: there is no spread to compare a deviation with."""
    head = torch.nn.Linear(32, 97, bias=False)
    torch.nn.init.zeros_(head.weight)
    runner = ModelRunner(ValueHeadModel(tiny_model("gemma2").model, head), role="value")
    assert check_model(runner) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "qwen3"])
def test_scalar_heads_pass(name: str, kind: str, dtype: torch.dtype) -> None:
    model = as_value_model(classifier(name, kind, vocab_size=97, seed=1))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    runner = ModelRunner(model, role="value", self_test=False)
    assert check_model(runner) < (5e-6 if dtype == torch.float32 else 0.03)
    assert runner.vocab_size == 97


def test_scalar_heads_are_refused_where_they_disagree(monkeypatch) -> None:
    model = as_value_model(classifier("mistral", "sequence", vocab_size=97, seed=1))
    plant(monkeypatch, lambda kwargs: kwargs | {"sliding_window": None})
    with pytest.raises(UnsupportedModelError, match="'mistral' computes other hidden states"):
        ModelRunner(model, role="value")


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}

UNSERVED = {
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    ),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
    "bert": ("BertConfig", SMALL),
    "llama4_text": (
        "Llama4TextConfig",
        {**SMALL, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **SMALL,
            "head_dim": 8,
            "num_experts": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "t5": ("T5Config", {"d_model": 32, "num_layers": 2, "d_ff": 48, "num_heads": 4}),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_refuses_what_it_cannot_serve(kind: str) -> None:
    class_name, fields = UNSERVED[kind]
    fields = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | fields
    config = getattr(transformers, class_name)(**fields)
    if kind == "t5":
        model: Any = transformers.T5ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    redraw_weights(model, 0)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"\w"):
        ModelRunner(model.eval(), role="base")
    assert model.config._attn_implementation == before


def test_refuses_what_is_no_transformers_model() -> None:
    with pytest.raises(UnsupportedModelError, match="transformers model, got Linear"):
        ModelRunner(torch.nn.Linear(2, 2), role="base")


def test_max_position() -> None:
    assert max_position(tiny_config("gpt2", n_positions=40)) == 40
    assert max_position(tiny_config("opt", max_position_embeddings=48)) == 48
    assert max_position(tiny_config("llama", max_position_embeddings=64)) == 64
    assert max_position(tiny_config("gemma3")) == 256
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config = tiny_config(
        "phi3", rope_parameters=longrope, original_max_position_embeddings=32, sliding_window=None
    )
    assert max_position(config) == 32


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_last_learned_position_works(name: str) -> None:
    """The limit is the table's end exactly: its last position runs, the next one cannot."""
    fields = {"n_positions": 20} if name == "gpt2" else {"max_position_embeddings": 20}
    model = tiny_model(name, **fields)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    model(ids, position_ids=torch.tensor([[19]]))
    with pytest.raises(IndexError):
        model(ids, position_ids=torch.tensor([[20]]))
