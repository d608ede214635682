# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import run_folder
from ivg_fast.training.evaluate import final_values
from ivg_fast.training.records import TrainingDataError
from ivg_fast.training.sft import new_gpt2
from ivg_fast.training.value import (
    ValueConfig,
    collate,
    encode,
    prefix_loss,
    train_value,
    with_hidden_states,
)
from ivg_fast.training.value_model import PrefixValueModel, value_model_from


def random_value_model(tokenizer, head: str, seed: int) -> PrefixValueModel:
    torch.manual_seed(seed)
    model = PrefixValueModel(new_gpt2(tokenizer, 2, 32, 64, seed=seed).base_model, head)
    for name, parameter in model.named_parameters():
        if name in ("shared", "delta"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def naive_values(model: PrefixValueModel, ids: list[int]) -> list[float]:
    """V of each prefix of two tokens or more, one unpadded forward a prefix, in float64."""
    backbone = model.backbone.double()
    weight = model.head_weight().detach().double()
    values = []
    for t in range(1, len(ids)):
        prefix = ids[:t] if model.head == "vocabulary" else ids[: t + 1]
        with torch.no_grad():
            hidden = backbone(input_ids=torch.tensor([prefix])).last_hidden_state[0, -1]
        row = weight[ids[t]] if model.head == "vocabulary" else weight[0]
        values.append(float(row @ hidden))
    backbone.float()
    return values


@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
@pytest.mark.parametrize("seed", range(2))
def test_batched_values_equal_one_prefix_at_a_time(tokenizer, head, seed):
    model = random_value_model(tokenizer, head, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (torch.randint(1, len(tokenizer), (n,), generator=generator).tolist(), 2, 0.0)
        for n in (5, 11, 8)
    ]
    batch = collate(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        values = model.values(batch["input_ids"], batch["attention_mask"])
    for row, (ids, _, _) in zip(values, rows, strict=True):
        expected = torch.tensor(naive_values(model, ids))
        torch.testing.assert_close(row[: len(ids) - 1], expected, atol=2e-4, rtol=1e-4)
        # control: a head that is off by one position is told apart
        assert not torch.allclose(row[1 : len(ids) - 1], expected[:-1], atol=1e-2)


def naive_loss(values, mask, rewards, objective):
    total = 0.0
    for row, chosen, reward in zip(values.tolist(), mask.tolist(), rewards.tolist(), strict=True):
        picked = [v for v, m in zip(row, chosen, strict=True) if m]
        targets = [reward] * len(picked)
        if objective == "cd-q":
            targets = [*picked[1:], reward]
        errors = [(v - t) ** 2 / 2 for v, t in zip(picked, targets, strict=True)]
        total += sum(errors) / len(errors)
    return total / len(values)


@pytest.mark.parametrize("objective", ["fudge", "cd-q"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_the_naive_one(objective, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 9, generator=generator).requires_grad_()
    rewards = torch.randn(4, generator=generator)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    spans = [(0, 9), (2, 7), (3, 4), (5, 9)]
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = True
    loss = prefix_loss(values, mask, rewards, objective)
    expected = naive_loss(values.detach(), mask, rewards, objective)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    other = {"fudge": "cd-q", "cd-q": "fudge"}[objective]
    assert abs(naive_loss(values.detach(), mask, rewards, other) - expected) > 1e-3  # control
    # targets are constants: dL/dV = (V - target) / (length * batch) at each prefix, 0 elsewhere
    loss.backward()
    assert (values.grad[~mask] == 0).all()
    for i, (start, end) in enumerate(spans):
        target = rewards[i].expand(end - start)
        if objective == "cd-q":
            target = torch.cat([values[i, start + 1 : end].detach(), rewards[i : i + 1]])
        expected_grad = (values[i, start:end].detach() - target) / (end - start) / 4
        torch.testing.assert_close(values.grad[i, start:end], expected_grad)


def test_mask_covers_the_response_alone(tokenizer):
    record = {"prompt": "the film", "response": " was great"}
    ids, num_prompt = encode(tokenizer, record, 64, append_eos=True)
    assert tokenizer.decode(ids[num_prompt:-1]) == " was great"
    assert ids[-1] == tokenizer.eos_token_id
    batch = collate([(ids, num_prompt, 0.5), (ids[:-1], num_prompt, 1.0)], 0)
    assert batch["mask"].sum(-1).tolist() == [len(ids) - num_prompt, len(ids) - 1 - num_prompt]
    assert batch["attention_mask"].sum(-1).tolist() == [len(ids), len(ids) - 1]


def test_vocabulary_head_file(tokenizer, tmp_path):
    """Keys are GPT-2's and score_head.weight; what is loaded values as what was saved."""
    model = random_value_model(tokenizer, "vocabulary", 0)
    model.save(tmp_path, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    reference = AutoModelForCausalLM.from_config(model.backbone.config)
    expected = {name for name in reference.state_dict() if name.startswith("transformer.")}
    assert set(tensors) == expected | {"score_head.weight"}
    assert tensors["score_head.weight"].shape == (len(tokenizer), 32)
    assert json.loads((tmp_path / "config.json").read_text())["value_head"] == "vocabulary"
    records = [{"prompt": "the film", "response": " was great but boring"}]
    loaded = PrefixValueModel.load(tmp_path)
    assert final_values(loaded, tokenizer, records) == pytest.approx(
        final_values(model, tokenizer, records), abs=1e-5
    )


def test_scalar_head_is_a_stock_sequence_classifier(tokenizer, tmp_path):
    model = random_value_model(tokenizer, "scalar", 0)
    model.save(tmp_path, tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert stock.config.num_labels == 1
    ids = tokenizer("the film was great", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model.values(ids)[0, -1].item() == pytest.approx(stock(ids).logits.item(), abs=1e-4)


@pytest.mark.parametrize(("head", "objective"), [("vocabulary", "fudge"), ("scalar", "cd-q")])
def test_training_learns_to_rank(tokenizer, model_folder, samples, tmp_path, head, objective):
    config = ValueConfig(
        str(tmp_path / "run"), objective, 16, 1e-2, 12.0, append_eos=False, save_dtype="float16"
    )
    metrics = train_value(value_model_from(model_folder, head), tokenizer, samples, config)
    assert metrics["num_steps"] == 12 * (len(samples) // 16)
    model = PrefixValueModel.load(tmp_path / "run")
    values = torch.tensor(final_values(model, tokenizer, samples))
    rewards = torch.tensor([record["reward"] for record in samples])
    correlation = torch.corrcoef(torch.stack([values, rewards]))[0, 1]
    assert correlation > 0.5


def test_bad_input_stops_before_training(tokenizer, model_folder, samples, tmp_path):
    def train(records, **overrides):
        settings = {"output_dir": str(tmp_path / "run"), **overrides}
        model = value_model_from(model_folder, "vocabulary")
        train_value(model, tokenizer, records, ValueConfig(**settings))

    with pytest.raises(TrainingDataError, match="is empty"):
        train([])
    with pytest.raises(TrainingDataError, match="missing column 'reward'"):
        train([{"prompt": "a", "response": "b"}])
    with pytest.raises(TrainingDataError, match="nan"):
        train([*samples, {**samples[0], "reward": float("nan")}])
    with pytest.raises(InvalidParameterError, match="batch_size"):
        train(samples[:3])
    with pytest.raises(InvalidParameterError, match="objective"):
        train(samples, objective="mc")
    with pytest.raises(InvalidParameterError, match="head"):
        value_model_from(model_folder, "linear")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InvalidParameterError, match="value_head"):
        PrefixValueModel.load(model_folder)
    with pytest.raises(InvalidParameterError, match="save_dtype"):
        ValueConfig("x", save_dtype="int8")
    assert run_folder.last_checkpoint(tmp_path) is None


def test_kept_hidden_states_are_the_trunks(tokenizer):
    model = random_value_model(tokenizer, "scalar", 3)
    rows = [([5, 6, 7, 8, 9], 2, 0.0), ([4, 3], 1, 1.0), ([9, 8, 7], 1, 2.0)]
    kept = with_hidden_states(model, rows, 2)
    assert [row[:3] for row in kept] == rows
    batch = collate(kept, 0)
    values = model.values_of(batch["hidden"], batch["input_ids"])
    others = values.roll(1, 0)
    for row, other, (ids, *_) in zip(values, others, rows, strict=True):
        expected = torch.tensor(naive_values(model, ids))
        torch.testing.assert_close(row[: len(ids) - 1], expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(other[: len(ids) - 1], expected, atol=1e-2)  # control


def test_a_head_learns_alone(tokenizer, model_folder, samples, tmp_path):
    """The trunk stays, and the head comes near the least squares of the kept hidden states."""
    config = ValueConfig(
        str(tmp_path / "run"), "fudge", 16, 3e-2, 60.0, 0.0, append_eos=False, train_backbone=False
    )
    train_value(value_model_from(model_folder, "scalar"), tokenizer, samples, config)
    model = PrefixValueModel.load(tmp_path / "run")
    trunk = value_model_from(model_folder, "scalar").backbone.state_dict()
    assert all(torch.equal(model.backbone.state_dict()[name], trunk[name]) for name in trunk)

    inputs, targets = [], []
    for record in samples:
        ids, num_prompt = encode(tokenizer, record, 512, False)
        with torch.no_grad():
            hidden = model.hidden_states(torch.tensor([ids]))[0, num_prompt:].double()
        share = len(hidden) ** -0.5  # each text counts once
        inputs.append(hidden * share)
        targets.append(torch.full((len(hidden),), record["reward"] * share, dtype=torch.float64))
    a, b = torch.cat(inputs), torch.cat(targets)
    best = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    optimum, ours, zero = (
        float(((a @ w - b) ** 2).sum()) for w in (best, model.shared[0].double(), 0 * best)
    )
    assert ours < optimum + 0.2 * (zero - optimum)
