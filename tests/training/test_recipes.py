# SPDX-License-Identifier: Apache-2.0
"""SFT, DPO and value runs: resuming, errors, and that DPO does what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, run_folder
from ivg_fast.training.dpo import DPORecipe, token_ids, train_dpo
from ivg_fast.training.evaluate import (
    implicit_values,
    pairwise_accuracy,
    response_logprobs,
    sides,
)
from ivg_fast.training.optim import Muon, MuonAdamW, orthogonalized
from ivg_fast.training.records import TrainingDataError
from ivg_fast.training.sft import SFTConfig, new_gpt2, perplexity, train_sft
from ivg_fast.training.value import ValueConfig, train_value
from ivg_fast.training.value_model import value_model_from


def run_sft(folder, tokenizer, model_folder, texts, samples, pairs, optimizer="adamw"):
    config = SFTConfig(str(folder), 32, 4, 1e-3, 2, optimizer, save_steps=5, seed=1)
    train_sft(common.load_model(model_folder), tokenizer, texts, config)


def run_sft_muon(*arguments):
    run_sft(*arguments, optimizer="muon")


def run_dpo(folder, tokenizer, model_folder, texts, samples, pairs, **options):
    options |= {"batch_size": 4, "epochs": 1, "save_steps": 5, "append_eos": False}
    config = DPORecipe(str(folder), **options)
    train_dpo(common.load_model(model_folder), tokenizer, pairs, config)


def run_dpo_lora(*arguments):
    run_dpo(*arguments, lora_rank=2, learning_rate=1e-2)


def run_value(folder, tokenizer, model_folder, texts, samples, pairs):
    config = ValueConfig(str(folder), batch_size=8, epochs=1, save_steps=5)
    train_value(value_model_from(model_folder, "vocabulary"), tokenizer, samples, config)


@pytest.mark.parametrize("run", [run_sft, run_sft_muon, run_dpo, run_dpo_lora, run_value])
def test_interrupted_run_resumes_to_the_same_weights(
    run, tokenizer, model_folder, texts, samples, pairs, tmp_path, monkeypatch
):
    if run in (run_dpo, run_dpo_lora):
        pytest.importorskip("trl", reason="needs the extra `train`")
    data = (tokenizer, model_folder, texts, samples, pairs)
    run(tmp_path / "whole", *data)
    original = transformers.Trainer.training_step
    steps = []

    def failing(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *data)
    assert run_folder.last_checkpoint(tmp_path / "cut").endswith("checkpoint-5")
    before = len(steps)
    run(tmp_path / "cut", *data)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(tmp_path / "cut" / "model.safetensors")
    start = load_file(model_folder / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)
    name = "transformer.h.0.attn.c_attn.weight"
    assert (whole[name] != start[name]).any()
    total = json_steps(tmp_path / "whole")
    assert len(steps) - before == total - 5  # the first five were not trained again


def json_steps(folder) -> int:
    return json.loads((folder / "metrics.json").read_text())["num_steps"]


def test_a_run_folder_refuses_other_settings(tokenizer, model_folder, texts, tmp_path):
    run_sft(tmp_path / "run", tokenizer, model_folder, texts, None, None)
    with pytest.raises(InvalidParameterError, match="optimizer must be 'adamw' to resume"):
        run_sft_muon(tmp_path / "run", tokenizer, model_folder, texts, None, None)


def test_muon_takes_the_matrices_of_the_blocks_alone(tiny_model):
    optimizer = MuonAdamW(tiny_model, 1e-3)
    muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in tiny_model.named_parameters():
        is_matrix = parameter.ndim == 2 and name.startswith("transformer.h.")
        assert (id(parameter) in muon) == is_matrix, name
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(tiny_model.parameters()))


def test_perplexity_equals_the_naive_one(tokenizer, tiny_model, texts):
    total, count = 0.0, 0
    for text in [text[:80] for text in texts[:5]]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        logits = tiny_model(torch.tensor([ids])).logits[0].double()
        for t in range(1, len(ids)):
            total -= torch.log_softmax(logits[t - 1], -1)[ids[t]].item()
            count += 1
    expected = math.exp(total / count)
    assert perplexity(
        tiny_model, tokenizer, [text[:80] for text in texts[:5]], 64
    ) == pytest.approx(expected, 1e-4)


def test_sft_rejects_bad_input(tokenizer, tiny_model, texts, tmp_path):
    config = SFTConfig(str(tmp_path / "run"), 32, 4)
    with pytest.raises(InvalidParameterError, match="texts"):
        train_sft(tiny_model, tokenizer, [], config)
    with pytest.raises(InvalidParameterError, match="block_size"):
        train_sft(tiny_model, tokenizer, ["the film"], config)
    with pytest.raises(InvalidParameterError, match="learning_rate"):
        SFTConfig("x", learning_rate=float("nan"))
    with pytest.raises(InvalidParameterError, match="hidden_size"):
        new_gpt2(tokenizer, 1, 33)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "value"])
def test_tokenizer_without_eos_is_refused(recipe, tiny_model, samples, pairs, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    folder = str(tmp_path / "run")
    runs = {
        "sft": lambda: train_sft(tiny_model, bare, ["a"], SFTConfig(folder)),
        "dpo": lambda: train_dpo(tiny_model, bare, pairs, DPORecipe(folder)),
        "value": lambda: train_value(tiny_model, bare, samples, ValueConfig(folder)),
    }
    with pytest.raises(InvalidParameterError, match="must have an EOS token"):
        runs[recipe]()


def test_log_probabilities_of_responses(tokenizer, tiny_model, samples):
    got = response_logprobs(tiny_model, tokenizer, samples[:6])
    for record, value in zip(samples[:6], got, strict=True):
        prompt = tokenizer(record["prompt"])["input_ids"]
        ids = prompt + tokenizer(record["response"])["input_ids"]
        logits = tiny_model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = sum(logits[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
        assert value == pytest.approx(expected, rel=1e-4)


def test_pairwise_accuracy():
    assert pairwise_accuracy([1.0, 0.0, 2.0, 5.0], [0.0, 1.0, 2.0, 1.0]) == 2.5 / 4
    with pytest.raises(InvalidParameterError):
        pairwise_accuracy([1.0], [])


def test_dpo_ids_are_those_of_the_decoder(tokenizer):
    pair = {"prompt": "the fil", "chosen": "m was", "rejected": " great"}
    ids = token_ids(tokenizer, pair, append_eos=False)
    assert ids["prompt_ids"] == tokenizer("the fil")["input_ids"]
    assert tokenizer.decode(ids["chosen_ids"]) == "m was"
    with_eos = token_ids(tokenizer, pair, append_eos=True)
    assert with_eos["rejected_ids"] == [*ids["rejected_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_dpo_learns_the_preference(lora_rank, tokenizer, model_folder, pairs, tmp_path):
    pytest.importorskip("trl", reason="needs the extra `train`")
    if lora_rank:
        pytest.importorskip("peft", reason="needs the extra `train`")
    config = DPORecipe(
        str(tmp_path / "run"), batch_size=8, learning_rate=5e-3, epochs=6, lora_rank=lora_rank
    )
    untuned = common.load_model(model_folder)
    train_dpo(common.load_model(model_folder), tokenizer, pairs, config)
    tuned = common.load_model(tmp_path / "run")  # LoRA is merged: a plain model
    chosen, rejected = sides(pairs)
    scores = [implicit_values(tuned, untuned, tokenizer, side) for side in (chosen, rejected)]
    assert pairwise_accuracy(*scores) > 0.8
    # control: the untuned pair prefers nothing
    none = [implicit_values(untuned, untuned, tokenizer, side) for side in (chosen, rejected)]
    assert pairwise_accuracy(*none) == 0.5


def test_dpo_rejects_bad_input(tokenizer, tiny_model, pairs, tmp_path):
    config = DPORecipe(str(tmp_path / "run"))
    with pytest.raises(TrainingDataError, match="is empty"):
        train_dpo(tiny_model, tokenizer, [], config)
    with pytest.raises(TrainingDataError, match="missing column 'chosen'"):
        train_dpo(tiny_model, tokenizer, [{"prompt": "a", "rejected": "b"}], config)
    with pytest.raises(InvalidParameterError, match="batch_size"):
        train_dpo(tiny_model, tokenizer, pairs[:3], config)
    with pytest.raises(InvalidParameterError, match="beta"):
        DPORecipe("x", beta=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "expected"), [("avx512_bf16", True), ("avx2", False)])
def test_bf16_only_where_the_cpu_multiplies_it(name, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, name: True})
    config = SFTConfig(str(tmp_path), 32, 4, 1e-3, 2)
    assert common.trainer_arguments(config, tmp_path)["bf16"] is expected
    precision = common.write_metrics(tmp_path, {})["precision"]
    assert ("bf16" in precision) is expected


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonalized_keeps_the_directions(shape):
    torch.manual_seed(shape[0])
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[1]))
    u, sizes, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    stretched = u.T @ orthogonalized(matrix).double() @ v.T
    is_large = sizes > 0.02 * matrix.norm()
    assert is_large.sum() > len(sizes) // 2
    assert stretched.diagonal()[is_large].min() > 0.4
    assert stretched.diagonal().max() < 1.4
    assert (stretched - torch.diag(stretched.diagonal())).abs().max() < 1e-3
    assert matrix.norm(dim=0).max() > 5 * matrix.norm(dim=0).min()  # it was no such matrix before


def test_muon_steps_as_that_of_torch():
    torch.manual_seed(0)
    start = [torch.randn(12, 30), torch.randn(30, 8)]
    ours = [torch.nn.Parameter(m.clone()) for m in start]
    theirs = [torch.nn.Parameter(m.clone()) for m in start]
    plain = [m.clone() for m in start]  # control: plain gradient steps go elsewhere
    muon = Muon(ours, 0.05, 0.1)
    other = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        for mine, its, own in zip(ours, theirs, plain, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
            own -= 0.05 * mine.grad
        muon.step()
        other.step()
    for mine, its, own, first in zip(ours, theirs, plain, start, strict=True):
        moved = (its - first).norm()
        assert (mine - its).norm() < 0.02 * moved  # bfloat16
        assert (own - its).norm() > 0.2 * moved
