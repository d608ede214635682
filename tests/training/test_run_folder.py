# SPDX-License-Identifier: Apache-2.0
"""What a run folder takes for the same run, and what an interruption may leave in it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, preferences, run_folder
from ivg_fast.training.dpo import DPORecipe, train_dpo
from ivg_fast.training.preferences import PreferenceConfig, sample_preferences
from ivg_fast.training.records import TrainingDataError, read_jsonl
from ivg_fast.training.sft import SFTConfig, train_sft
from ivg_fast.training.stages import Stages
from ivg_fast.training.value import ValueConfig, train_value
from ivg_fast.training.value_model import value_model_from


class Data:
    """What the recipes read, in the sizes of a second."""

    def __init__(self, tokenizer, model_folder, texts, samples, pairs):
        self.tokenizer, self.model_folder = tokenizer, model_folder
        self.texts, self.samples, self.pairs = texts[:40], samples[:16], pairs[:16]

    def model(self):
        return common.load_model(self.model_folder)

    def sft(self, folder):
        config = SFTConfig(str(folder), 32, 4, 1e-3, 1, save_steps=3)
        return train_sft(self.model(), self.tokenizer, self.texts, config)

    def dpo(self, folder):
        config = DPORecipe(str(folder), batch_size=4, epochs=1)
        return train_dpo(self.model(), self.tokenizer, self.pairs, config)

    def value(self, folder):
        config = ValueConfig(str(folder), batch_size=4, epochs=1)
        model = value_model_from(self.model_folder, "vocabulary")
        return train_value(model, self.tokenizer, self.samples, config)

    def preferences(self, folder, reward=None):
        config = PreferenceConfig(str(folder), max_new_tokens=4, batch_size=4)
        prompts = [text[:12] for text in self.texts[:8]]
        model = self.model()
        return sample_preferences(model, self.tokenizer, prompts, reward or length, config)


def length(texts):
    return [float(len(text)) for text in texts]


def minus_length(texts):
    return [-float(len(text)) for text in texts]


@pytest.fixture
def data(tokenizer, model_folder, texts, samples, pairs):
    return Data(tokenizer, model_folder, texts, samples, pairs)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "value", "preferences"])
def test_a_finished_run_is_not_run_again_and_other_data_is_refused(
    recipe, data, tmp_path, monkeypatch
):
    if recipe == "dpo":
        pytest.importorskip("trl", reason="needs the extra `train`")
    metrics = getattr(data, recipe)(tmp_path / "run")

    def none_left(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", none_left)
        patch.setattr(preferences, "sample_responses", none_left)
        assert getattr(data, recipe)(tmp_path / "run") == metrics
    data.texts = [f"so {text}" for text in data.texts]  # as many, but others
    data.pairs = [{**pair, "chosen": pair["rejected"]} for pair in data.pairs]
    data.samples = [{**sample, "reward": -sample["reward"]} for sample in data.samples]
    with pytest.raises(InvalidParameterError, match=r"data must be '\w+' to resume the run in"):
        getattr(data, recipe)(tmp_path / "run")


@pytest.mark.parametrize("recipe", ["sft", "dpo", "value", "preferences"])
def test_other_weights_at_the_same_path_are_another_run(recipe, data, tmp_path):
    """Those of a step of training: nearly all move, by little."""
    if recipe == "dpo":
        pytest.importorskip("trl", reason="needs the extra `train`")
    copy = tmp_path / "model"
    shutil.copytree(data.model_folder, copy)
    data.model_folder = copy
    getattr(data, recipe)(tmp_path / "run")
    weights = load_file(copy / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in weights.items():
        weights[name] = tensor + 1e-5 * torch.randn_like(tensor)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidParameterError, match=r"weights must be '\w+' to resume the run in"):
        getattr(data, recipe)(tmp_path / "run")


def test_another_reward_is_another_run(data, tmp_path):
    calls = []

    def failing(texts):
        calls.append(texts)
        if len(calls) == 2:
            raise RuntimeError("no such luck")
        return length(texts)

    with pytest.raises(TrainingDataError, match="failing must return a number a text, got Runtime"):
        data.preferences(tmp_path / "run", failing)
    with pytest.raises(InvalidParameterError, match=r"reward must be '.*failing' to resume"):
        data.preferences(tmp_path / "run", minus_length)
    data.preferences(tmp_path / "run", failing)
    whole = data.preferences(tmp_path / "whole")
    found = [read_jsonl(tmp_path / name / "samples.jsonl", {}) for name in ("run", "whole")]
    assert found[0] == found[1]
    assert len(found[0]) == whole["num_samples"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda texts: [1.0], "got 1 for 4 texts"),
        (lambda texts: 1.0, "not iterable"),
        (lambda texts: ["good"] * len(texts), "could not convert"),
        (lambda texts: [float("nan")] * len(texts), "finite number, got nan"),
        (lambda texts: [1e300] * len(texts), r"at most 1e\+15 in size"),
    ],
)
def test_what_a_reward_may_not_return(returned, message, data, tmp_path):
    with pytest.raises(TrainingDataError, match=message):
        data.preferences(tmp_path / "run", returned)


def test_a_torn_checkpoint_is_passed_over(data, tmp_path, monkeypatch):
    """A kill while the Trainer writes leaves a checkpoint without its state, or half of it."""
    data.sft(tmp_path / "whole")
    original = transformers.Trainer.training_step
    steps = []

    def killed(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            data.sft(tmp_path / "cut")
    checkpoints = tmp_path / "cut" / "checkpoints"
    whole = checkpoints / "checkpoint-3"
    assert run_folder.last_checkpoint(tmp_path / "cut") == str(whole)
    for step, state in ((6, None), (9, '{"best')):
        torn = checkpoints / f"checkpoint-{step}"
        shutil.copytree(whole, torn)
        (torn / "trainer_state.json").unlink()
        if state:
            (torn / "trainer_state.json").write_text(state)
    assert run_folder.last_checkpoint(tmp_path / "cut") == str(whole)
    data.sft(tmp_path / "cut")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_folders_that_no_run_can_have(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidParameterError, match="output_dir must be a folder that can be wri"):
        data.sft(tmp_path / "file")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{")
    with pytest.raises(InvalidParameterError, match="output_dir must hold no run"):
        data.sft(tmp_path / "torn")
    with pytest.raises(InvalidParameterError, match="work must be a folder that can be written"):
        Stages(tmp_path / "file" / "below", {}).build([])


def test_pairs_without_room_are_left_out_and_not_counted(data, tmp_path):
    pytest.importorskip("trl", reason="needs the extra `train`")
    long = {"prompt": "the film " * 60, "chosen": " a", "rejected": " b"}
    data.pairs = [*data.pairs[:8], *[long] * 4]
    config = DPORecipe(str(tmp_path / "run"), batch_size=4, epochs=1, max_length=64)
    metrics = train_dpo(data.model(), data.tokenizer, data.pairs, config)
    assert (metrics["num_pairs"], metrics["num_steps"]) == (8, 2)
    with pytest.raises(InvalidParameterError, match="batch_size must be <= 0, the pairs"):
        train_dpo(data.model(), data.tokenizer, [long] * 4, config)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        *((kind, "seed", -1) for kind in (SFTConfig, DPORecipe, ValueConfig, PreferenceConfig)),
        *((kind, "seed", 2**32) for kind in (SFTConfig, PreferenceConfig)),
        *((kind, "weight_decay", -1.0) for kind in (SFTConfig, DPORecipe, ValueConfig)),
        *((kind, "warmup_ratio", 1.0) for kind in (SFTConfig, DPORecipe, ValueConfig)),
        (SFTConfig, "block_size", 1),
        (DPORecipe, "max_length", 1),
        (ValueConfig, "max_length", -3),
        (PreferenceConfig, "top_k", -1),
        (PreferenceConfig, "top_p", 0.0),
        (PreferenceConfig, "top_p", 2.0),
    ],
)
def test_settings_that_no_run_can_have(config, name, value):
    with pytest.raises(InvalidParameterError, match=f"^{name} must be") as caught:
        config("unused", **{name: value})
    assert caught.value.value == value
    config("unused")  # control: as it is otherwise


def test_warmup_and_decay_share_the_steps():
    SFTConfig("unused", schedule="wsd", warmup_ratio=0.5, decay_ratio=0.4)
    with pytest.raises(InvalidParameterError, match=r"decay_ratio must be in \[0, 0.5\)"):
        SFTConfig("unused", schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6)


def test_texts_beyond_the_models_positions(data, tmp_path):
    long = [{"prompt": "the film " * 60, "response": " great", "reward": 1.0}] * 4
    cut = [{**record, "chosen": " great", "rejected": " awful"} for record in long]
    runs = {
        "block_size": lambda: train_sft(
            data.model(), data.tokenizer, data.texts, SFTConfig(str(tmp_path / "a"), 65, 4)
        ),
        "max_length": lambda: train_value(
            value_model_from(data.model_folder, "scalar"),
            data.tokenizer,
            long,
            ValueConfig(str(tmp_path / "b"), batch_size=4),
        ),
        "max_new_tokens": lambda: sample_preferences(
            data.model(),
            data.tokenizer,
            ["the film"],
            length,
            PreferenceConfig(str(tmp_path / "c"), max_new_tokens=64),
        ),
    }
    runs["max_length "] = lambda: train_dpo(
        data.model(), data.tokenizer, cut, DPORecipe(str(tmp_path / "d"), batch_size=4)
    )
    for name, run in runs.items():
        with pytest.raises(
            InvalidParameterError, match=f"{name.strip()} must keep texts within .* 64"
        ):
            run()
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_not_saved(data, tmp_path):
    config = ValueConfig(str(tmp_path / "run"), batch_size=4, epochs=20, learning_rate=1e30)
    model = value_model_from(data.model_folder, "vocabulary")
    with pytest.raises(InvalidParameterError, match=r"learning_rate must be lower: .* got 1e\+30"):
        train_value(model, data.tokenizer, data.samples, config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_digest_tells_order_and_content_apart():
    records = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    same = json.loads(json.dumps([dict(reversed(record.items())) for record in records]))
    assert run_folder.digest(same) == run_folder.digest(records)
    others = [records[::-1], records[:1], [{"a": 1, "b": "xy"}, {"a": 2, "b": ""}]]
    assert len({run_folder.digest(each) for each in [records, *others]}) == 4
