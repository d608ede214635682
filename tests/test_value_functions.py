# SPDX-License-Identifier: Apache-2.0
"""Value functions that a user gives: of their own, in folders, on a trunk; and what is refused."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from engine_cases import (
    Family,
    compare,
    fresh_seed,
    pair_tokenizer,
    random_case,
    random_prompt,
    run_engine,
)
from safetensors.torch import save_file
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from ivg_fast import (
    CapacityError,
    Engine,
    EngineConfig,
    InvalidParameterError,
    ResponseScorer,
    ScoreInput,
    SearchParams,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.models.value_head import ScalarHeadModel, ValueModel, load_value_model
from ivg_fast.models.values import ExplicitValue
from ivg_fast.request import ROLES, LiveRequest, RolePrompt

SEED = fresh_seed()


def family(value: str, shape: str = "gpt2") -> Family:
    return Family(shape, seed=SEED, value=value)


class LengthValue:
    """A ValueFunction of a user: longer is better, until it is enough."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_closed = False

    def __call__(self, inputs: list[ScoreInput]) -> list[float]:
        self.num_calls += 1
        return [len(item.response) % 7 + len(item.prompt) + 3.0 * item.ends_text for item in inputs]

    def close(self) -> None:
        self.is_closed = True


def test_a_value_function_of_ones_own() -> None:
    """As the engine's value and as a scorer; asked by requests and by nothing else."""
    given = family("scalar")
    base, value = given.roles()["base"], LengthValue()
    prompt = random_prompt(random.Random(SEED), given)
    params = [
        SearchParams.cbs(max_tokens=9, beam_width=2, num_candidates=2, scorer=scorer)
        for scorer in ("explicit", value)
    ]
    with Engine(base, given.tokenizer(), value=value) as engine_:
        outputs = engine_.generate([prompt] * 2, params, seeds=[5, 5])
        assert [o.token_ids for o in outputs[0].outputs] == [
            o.token_ids for o in outputs[1].outputs
        ]
        assert outputs[0].outputs[0].score == outputs[1].outputs[0].score > 0
        calls = value.num_calls
        engine_.generate(prompt, SearchParams(max_tokens=3))
        assert value.num_calls == calls > 0
        with pytest.raises(UnsupportedModelError, match=r"guidance 'explicit' .* number a text"):
            engine_.generate(prompt, SearchParams(max_tokens=3, guidance="explicit"))
        assert not value.is_closed
    assert value.is_closed


def test_an_engine_that_fails_leaves_the_value_function_open() -> None:
    value = LengthValue()
    with pytest.raises(VocabularyMismatchError):
        Engine(family("scalar").roles()["base"], pair_tokenizer(), value=value)
    assert not value.is_closed


def test_a_value_model_that_is_closed_or_has_no_memory() -> None:
    roles = family("text").roles()
    value = TextValueModel(roles.pop("value"), pair_tokenizer())
    with Engine(roles["base"], family("text").tokenizer(), value=value):
        pass
    assert value.is_closed
    for taker in (partial(Engine, roles["base"], family("text").tokenizer()), ResponseScorer):
        with pytest.raises(InvalidParameterError, match="value must not be closed"):
            taker(value=value)
    for num_blocks in (0, -3, 1.5):
        with pytest.raises(InvalidParameterError, match="num_blocks must be an integer"):
            TextValueModel(value.runner.model, value.tokenizer, num_blocks=num_blocks)


@pytest.mark.parametrize("role", ["base", "value"])
def test_from_pretrained_takes_folders(role: str, tmp_path: Path) -> None:
    given = {"base": tmp_path, "value": LengthValue()} if role == "value" else {"base": None}
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InvalidParameterError, match=f"{role} must be a folder or hub name"):
        Engine.from_pretrained(**given)


@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_an_adapted_reward_model(kind: str, is_folder: bool, tmp_path: Path) -> None:
    """PEFT keeps the trained head beside the first one; against the adapted model itself."""
    is_sequence = kind == "sequence"
    auto = AutoModelForSequenceClassification if is_sequence else AutoModelForTokenClassification
    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(3)
    auto.from_config(config).save_pretrained(tmp_path / "plain")
    plain = auto.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    lora = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "up_proj"],
        task_type="SEQ_CLS" if is_sequence else "TOKEN_CLS",
    )
    model = peft.get_peft_model(plain, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.eval()
    ids = [[5, 6, 7, 8, 9], [3, 4]]
    with torch.inference_mode():
        exact = [float(model(torch.tensor([text])).logits.reshape(-1)[-1]) for text in ids]
    if is_folder:
        model.save_pretrained(tmp_path / "adapter")
        loaded = load_value_model(tmp_path / "adapter")
    with ResponseScorer(value=loaded if is_folder else model) as scorer:
        scores = scorer.score([text[:1] for text in ids], [text[1:] for text in ids], "explicit")
    assert scores == pytest.approx(exact, abs=1e-5)
    assert abs(exact[0] - exact[1]) > 1e-3


def test_a_value_that_is_none() -> None:
    base = family("scalar").roles()["base"]
    with pytest.raises(InvalidParameterError, match="value must be a model or a ValueFunction"):
        Engine(base, value=3)
    with (
        Engine(base, value=LengthValue()) as engine_,
        pytest.raises(InvalidParameterError, match="scorer need an engine with a tokenizer"),
    ):
        engine_.generate([[1, 2]], SearchParams.best_of_n(2, max_tokens=3))


@pytest.mark.parametrize(("value", "kind"), [("scalar", "prefix"), ("text", "text")])
def test_only_a_vocabulary_head_guides_tokens(value: str, kind: str) -> None:
    params = SearchParams(max_tokens=3, guidance="explicit")
    with pytest.raises(UnsupportedModelError, match=f"this engine's gives a number a {kind}"):
        family(value).engine().generate([[1, 2]], params)


@pytest.mark.parametrize(("value", "role"), [("scalar", "value"), ("scalar trunk", "tuned")])
def test_the_end_of_text_needs_a_position(value: str, role: str) -> None:
    engine_ = family(value).engine()
    prompt = [1] * 244  # and 12 tokens fill 256 positions
    params = SearchParams.ivg(max_tokens=12, ignore_eos=True)
    assert engine_.generate([prompt], params)
    with pytest.raises(CapacityError, match=f"exceed the 256 positions of {role}"):
        engine_.generate([prompt], replace(params, score_eos_on_truncation=True))
    assert engine_.generate([prompt[1:]], replace(params, score_eos_on_truncation=True))


def test_a_shared_trunk_reads_one_prompt() -> None:
    value = ExplicitValue("vocabulary", shares_trunk=True)
    prompts = {role: RolePrompt(None, np.arange(1, 5)) for role in ROLES}
    prompts["value"] = RolePrompt(None, np.arange(2, 6))
    for params in (
        SearchParams.ivg(max_tokens=3),
        SearchParams.cbs(max_tokens=3, guidance="explicit", scorer="implicit"),
    ):
        with pytest.raises(InvalidParameterError, match="prompts must be the same for value and"):
            LiveRequest.create(params, prompts, 1, [], value)
    assert LiveRequest.create(SearchParams.eft(max_tokens=3), prompts, 1, [], value)
    params = SearchParams.cbs(max_tokens=3, scorer="explicit")
    assert set(LiveRequest.create(params, prompts, 1, [], value).prompt_ids) == {"base", "value"}


@pytest.mark.parametrize("value", ["text", "scalar text", "scalar", "sequence"])
def test_folders_say_what_they_hold(tmp_path: Path, caplog, value: str) -> None:
    """Another tokenizer in the value's folder, and the value goes through text."""
    given = family(value, "llama")
    roles = given.roles()
    model, is_text = roles["value"], "text" in value
    for role in ("base", "tuned", "untuned"):
        roles[role].save_pretrained(tmp_path / role)
        given.tokenizer().save_pretrained(tmp_path / role)
    save_value(model, tmp_path / "value")
    (pair_tokenizer() if is_text else given.tokenizer()).save_pretrained(tmp_path / "value")
    rng = random.Random(f"{SEED} folders")
    cases = [random_case(rng, given, "implicit", "explicit") for _ in range(3)]
    results = [case.solve(given.naive()) for case in cases]
    with (
        caplog.at_level(logging.INFO, logger="ivg_fast"),
        Engine.from_pretrained(
            *(tmp_path / role for role in ROLES), config=EngineConfig(num_blocks=200)
        ) as engine_,
    ):
        assert ("scores texts: token id" in caplog.text) == is_text
        assert compare(run_engine(engine_, cases), results, cases)[0] == []
        if is_text:
            with pytest.raises(UnsupportedModelError, match="guidance 'explicit'"):
                engine_.generate([[1]], SearchParams(max_tokens=3, guidance="explicit"))


def save_value(model: Any, folder: Path) -> None:
    """A checkpoint as training and transformers write them."""
    if not isinstance(model, ValueModel):
        model.save_pretrained(folder)
        return
    prefix = model.backbone.base_model_prefix
    state = {f"{prefix}.{k}": x.clone() for k, x in model.backbone.state_dict().items()}
    is_scalar = isinstance(model, ScalarHeadModel)
    state["score.weight" if is_scalar else "score_head.weight"] = model.score_head.weight
    if is_scalar:
        model.config.num_labels = 1
        family = type(model.backbone).__name__.removesuffix("Model")
        model.config.architectures = [f"{family}ForSequenceClassification"]
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
