# SPDX-License-Identifier: Apache-2.0
"""Loading from folders: what goes in comes out, and nothing unsafe or incomplete gets in."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from engine_cases import CLASSIFIERS, classifier
from safetensors.torch import load_file, save_file
from tiny_models import redraw_weights, tiny_config, tiny_model, tiny_tokenizer
from transformers import LlamaForSequenceClassification

from ivg_fast.errors import InvalidParameterError, UnsupportedModelError
from ivg_fast.models.loading import load_model, load_tokenizer
from ivg_fast.models.value_head import (
    ScalarHeadModel,
    ValueHeadModel,
    as_value_model,
    load_value_model,
)
from ivg_fast.training.value_model import PrefixValueModel

IDS = torch.arange(12)[None]


def save_value_folder(folder: Path, name: str, seed: int, *, num_shards: int = 1) -> ValueHeadModel:
    """A value checkpoint as the training writes it; returns the model that it holds."""
    causal = tiny_model(name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(97, 32, generator=generator)
    causal.config.save_pretrained(folder)
    state = {key: x.clone() for key, x in causal.state_dict().items() if "lm_head" not in key}
    state["score_head.weight"] = head
    if num_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i, key in enumerate(sorted(state)):
            weight_map[key] = f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors"
        for file in set(weight_map.values()):
            part = {key: x for key, x in state.items() if weight_map[key] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    score_head = torch.nn.Linear(32, 97, bias=False)
    score_head.weight.data = head
    return ValueHeadModel(causal.base_model, score_head)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_model_roundtrip(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_float16_runs_in_float32_on_the_cpu(tmp_path: Path, caplog) -> None:
    model = tiny_model("llama", dtype=torch.float16)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="ivg_fast"):
        loaded = load_model(tmp_path, device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert len(caplog.records) == 1
    assert "float16" in caplog.text
    for mine, stored in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, stored.float())


def test_other_dtypes_stay(tmp_path: Path, caplog) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="ivg_fast"):
        assert load_model(tmp_path).dtype == torch.bfloat16
        assert load_model(tmp_path, dtype="float16").dtype == torch.float16
        assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert not caplog.records
    for wrong in ("int8", torch.float64, "no such thing"):
        with pytest.raises(InvalidParameterError, match="dtype"):
            load_model(tmp_path, dtype=wrong)


def test_a_module_in_hand_is_only_changed_on_request() -> None:
    model = tiny_model("llama", dtype=torch.float16).train()
    assert load_model(model) is model
    assert model.dtype == torch.float16
    assert not model.training
    load_model(model, dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_conversion_keeps_rotary_frequencies() -> None:
    model = tiny_model("llama")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    load_model(model, dtype="bfloat16")
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_pickles_are_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(tmp_path)
    with pytest.raises(InvalidParameterError, match="pickles are not loaded"):
        load_value_model(tmp_path)


def test_tokenizer_roundtrip(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    text = "the quick (brown) fox"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_value_roundtrip(tmp_path: Path, name: str, num_shards: int) -> None:
    expected = save_value_folder(tmp_path, name, 3, num_shards=num_shards)
    loaded = load_value_model(tmp_path)
    loaded.backbone.set_attn_implementation(expected.config._attn_implementation)
    assert torch.equal(loaded(IDS), expected(IDS))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_value_float16_rule_covers_the_head(tmp_path: Path) -> None:
    save_value_folder(tmp_path, "gpt2", 3)
    state = {key: x.half() for key, x in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_value_model(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert load_value_model(tmp_path, dtype="bfloat16").score_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("lost", ["score_head.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_an_incomplete_value_is_refused(tmp_path: Path, lost: str) -> None:
    save_value_folder(tmp_path, "gpt2", 3)
    state = load_file(tmp_path / "model.safetensors")
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidParameterError, match=lost.removeprefix("transformer.")):
        load_value_model(tmp_path)


def test_an_incomplete_model_is_refused(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.1.mlp.c_fc.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidParameterError, match=r"h\.1\.mlp\.c_fc\.weight"):
        load_model(tmp_path)


def test_value_head_fits_its_backbone() -> None:
    backbone = tiny_model("gpt2").transformer
    with pytest.raises(InvalidParameterError, match="hidden size 32"):
        ValueHeadModel(backbone, torch.nn.Linear(31, 97, bias=False))
    with pytest.raises(InvalidParameterError, match="bias"):
        ValueHeadModel(backbone, torch.nn.Linear(32, 97))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InvalidParameterError, match="tokenizer must be loadable") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


CLASSIFIED = [
    (kind, name)
    for kind in CLASSIFIERS
    for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "gpt_neox")
] + [("sequence", "gemma3"), ("sequence", "opt"), ("sequence", "phi3"), ("token", "stablelm")]


@pytest.mark.parametrize(("kind", "name"), CLASSIFIED)
def test_scalar_roundtrip(tmp_path: Path, kind: str, name: str) -> None:
    """Either head name, with and without a bias; the stock model says what it is worth."""
    stock = classifier(name, kind, vocab_size=97, seed=3)
    stock.save_pretrained(tmp_path)
    loaded = load_value_model(tmp_path)
    assert isinstance(loaded, ScalarHeadModel)
    loaded.backbone.set_attn_implementation(stock.config._attn_implementation)
    for n in (1, 5, 12):
        wanted = stock(IDS[:, :n]).logits.reshape(-1)[-1]
        torch.testing.assert_close(loaded(IDS[:, :n])[0, -1, 0], wanted)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("head", ["scalar", "vocabulary"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_training_saves(tmp_path: Path, name: str, head: str) -> None:
    trained = PrefixValueModel(tiny_model(name, seed=2).base_model, head).eval()
    for parameter in (trained.shared, *([trained.delta] if head == "vocabulary" else [])):
        torch.nn.init.normal_(parameter)
    trained.save(tmp_path, tiny_tokenizer())
    loaded = load_value_model(tmp_path)
    assert isinstance(loaded, ScalarHeadModel if head == "scalar" else ValueHeadModel)
    with torch.inference_mode():
        values = loaded(IDS)[0]
        wanted = trained.values(IDS)[0]
    if head == "scalar":
        torch.testing.assert_close(values[1:, 0], wanted)
    else:
        torch.testing.assert_close(values[:-1].gather(1, IDS[0, 1:, None])[:, 0], wanted)


def test_a_module_in_hand_keeps_its_parts() -> None:
    stock = classifier("llama", "sequence", vocab_size=97, seed=3)
    model = as_value_model(stock)
    assert model.backbone is stock.model
    assert model.score_head is stock.score
    assert as_value_model(model) is model


@pytest.mark.parametrize("num_labels", [2, 5])
def test_one_label_only(tmp_path: Path, num_labels: int) -> None:
    config = tiny_config("gpt2", num_labels=num_labels)
    model = CLASSIFIERS["sequence"].from_config(config)
    model.save_pretrained(tmp_path)
    for refused in (lambda: load_value_model(tmp_path), lambda: as_value_model(model)):
        with pytest.raises(InvalidParameterError, match="num_labels must be 1") as caught:
            refused()
        assert caught.value.value == num_labels


def test_a_language_model_is_no_value(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InvalidParameterError, match=r"score_head.weight .* or be a sequence or"):
        load_value_model(tmp_path)
    with pytest.raises(UnsupportedModelError, match="got GPT2LMHeadModel"):
        as_value_model(tiny_model("gpt2"))


class MoreForSequenceClassification(LlamaForSequenceClassification):
    """Not a linear head alone: what it gives is squashed."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.tanh() + 1
        return output


def test_a_head_that_is_more_than_linear_is_refused() -> None:
    model = MoreForSequenceClassification(tiny_config("llama", num_labels=1))
    redraw_weights(model, 1)
    with pytest.raises(UnsupportedModelError, match="more than a linear head"):
        as_value_model(model)


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    classifier("llama", "sequence", vocab_size=97, seed=3).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["score.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidParameterError, match=r"score\.weight"):
        load_value_model(tmp_path)


def test_pickled_classifiers_are_refused(tmp_path: Path) -> None:
    model = classifier("gpt2", "sequence", vocab_size=97, seed=3)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidParameterError, match="pickles are not loaded"):
        load_value_model(tmp_path)


def test_scalar_head_has_one_output() -> None:
    with pytest.raises(InvalidParameterError, match="out_features must be 1"):
        ScalarHeadModel(tiny_model("gpt2").transformer, torch.nn.Linear(32, 2))
