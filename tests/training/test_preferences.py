# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import evaluate, preferences
from ivg_fast.training.dpo import token_ids
from ivg_fast.training.preferences import (
    PreferenceConfig,
    bradley_terry_pairs,
    ranked_pairs,
    sample_preferences,
    sample_responses,
)
from ivg_fast.training.records import SAMPLE_COLUMNS, TrainingDataError, read_jsonl
from ivg_fast.training.value import encode


def length_reward(texts):
    return [float(len(text)) for text in texts]


@pytest.mark.parametrize("difference", [0.0, 0.7, 2.0])
def test_winners_are_bradley_terry(difference):
    n = 4000
    records = [
        {"prompt": f"{i}", "response": name, "reward": reward}
        for i in range(n)
        for name, reward in (("a", difference), ("b", 0.0))
    ]
    wins = sum(pair["chosen"] == "a" for pair in bradley_terry_pairs(records, 1))
    expected = 1 / (1 + math.exp(-difference))
    sigma = math.sqrt(n * expected * (1 - expected))
    assert abs(wins - n * expected) < 5 * sigma
    if difference:  # control: labelling by order alone would be far outside
        assert abs(n - n * expected) > 5 * sigma


def test_equal_responses_make_no_pair():
    records = [{"prompt": "p", "response": "a", "reward": 1.0}] * 2
    assert bradley_terry_pairs(records, 0) == []


def test_close_pairs_are_left_out():
    records = [
        {"prompt": f"{i}", "response": name, "reward": reward}
        for i in range(30)
        for name, reward in (("a", i / 10), ("b", 0.0))
    ]
    everything = bradley_terry_pairs(records, 0)
    kept = bradley_terry_pairs(records, 0, min_reward_gap=1.5)
    assert kept == [pair for pair in everything if float(pair["prompt"]) / 10 >= 1.5]


def test_padding_does_not_change_greedy_text(tokenizer, tiny_model):
    prompts = ["the film", "the film was great but very boring scene and plot"]
    config = PreferenceConfig("unused", max_new_tokens=6, temperature=1e-4, ignore_eos=True)
    together = sample_responses(tiny_model, tokenizer, prompts, config, 0)
    alone = [sample_responses(tiny_model, tokenizer, [p], config, 0)[0] for p in prompts]
    assert together == alone


def test_ignore_eos_gives_full_length(tokenizer, tiny_model):
    tiny_model.transformer.ln_f.bias.data.zero_()
    tiny_model.lm_head.weight.data[tokenizer.eos_token_id] *= 50
    config = PreferenceConfig("unused", max_new_tokens=9, ignore_eos=True)
    ((text, is_whole),) = sample_responses(tiny_model, tokenizer, ["the film"], config, 0)
    assert tokenizer.eos_token not in text
    assert not is_whole


def test_no_response_ends_early(tokenizer, tiny_model):
    model = only_end(tiny_model, tokenizer)
    config = PreferenceConfig("unused", max_new_tokens=9, min_new_tokens=5)
    ((text, is_whole),) = sample_responses(model, tokenizer, ["the film"], config, 0)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(text) > 0
    assert len(ids) <= 5  # pieces may join; without the limit it would be empty
    assert is_whole


def only_end(model, tokenizer):
    """`model` made to answer every prompt with an end of text."""
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.copy_(model.lm_head.weight.data[tokenizer.eos_token_id] * 1e4)
    return model


def test_an_end_alone_is_a_response(tokenizer, tiny_model, tmp_path):
    model = only_end(tiny_model, tokenizer)
    config = PreferenceConfig(str(tmp_path / "run"), max_new_tokens=3)
    metrics = sample_preferences(model, tokenizer, ["the film"], length_reward, config)
    assert metrics["num_samples"] == 2
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl", SAMPLE_COLUMNS)
    assert (
        samples
        == [{"prompt": "the film", "response": "", "reward": 8.0, "response_is_whole": True}] * 2
    )
    prompt = tokenizer("the film")["input_ids"]
    assert encode(tokenizer, samples[0], 64, append_eos=True) == (
        [*prompt, tokenizer.eos_token_id],
        len(prompt),
    )


def test_pairs_say_which_responses_were_cut(tokenizer):
    records = [
        {"prompt": "p", "response": "film", "reward": 60.0, "response_is_whole": False},
        {"prompt": "p", "response": "plot", "reward": 0.0, "response_is_whole": True},
    ]
    (pair,) = bradley_terry_pairs(records, 0)
    assert (pair["chosen_is_whole"], pair["rejected_is_whole"]) == (False, True)
    ids, end = token_ids(tokenizer, pair, append_eos=True), tokenizer.eos_token_id
    assert end not in ids["chosen_ids"]
    assert ids["rejected_ids"][-1] == end
    chosen, rejected = evaluate.sides([pair])
    assert end not in encode(tokenizer, chosen[0], 64, append_eos=True)[0]
    assert encode(tokenizer, rejected[0], 64, append_eos=True)[0][-1] == end


def test_ranking_swaps_all_that_belongs_to_a_response():
    pair = {
        "prompt": "p",
        "chosen": "worse",
        "chosen_reward": -1.0,
        "chosen_is_whole": False,
        "rejected": "better",
        "rejected_reward": 2.0,
        "rejected_is_whole": True,
    }
    (better,) = evaluate.ranked([pair])
    assert (better["prompt"], better["chosen"], better["rejected"]) == ("p", "better", "worse")
    assert (better["chosen_reward"], better["rejected_reward"]) == (2.0, -1.0)
    assert (better["chosen_is_whole"], better["rejected_is_whole"]) == (True, False)
    assert evaluate.ranked([better]) == [better]
    assert pair["chosen"] == "worse"


def test_interrupted_sampling_resumes_to_the_same_data(
    tokenizer, model_folder, tmp_path, monkeypatch
):
    from ivg_fast.training import common

    model = common.load_model(model_folder)
    prompts = [f"the film {i}" for i in range(10)]

    def run(name):
        config = PreferenceConfig(str(tmp_path / name), max_new_tokens=5, batch_size=4)
        return sample_preferences(model, tokenizer, prompts, length_reward, config)

    metrics = run("whole")
    assert metrics["num_samples"] <= 20
    original = preferences.sample_responses
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(preferences, "sample_responses", failing)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    with (tmp_path / "cut" / "batches.jsonl").open("ab") as handle:
        handle.write('[{"prompt": "torn within é'.encode()[:-1])
    run("cut")
    assert len(calls) == 3 + 3  # the first two batches were not sampled again
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_bad_input(tokenizer, tiny_model, tmp_path):
    with pytest.raises(InvalidParameterError, match="temperature"):
        PreferenceConfig("x", temperature=0.0)
    with pytest.raises(InvalidParameterError, match="min_new_tokens"):
        PreferenceConfig("x", max_new_tokens=5, min_new_tokens=6)
    with pytest.raises(InvalidParameterError, match="num_samples"):
        PreferenceConfig("x", num_samples=0)
    config = PreferenceConfig(str(tmp_path / "run"), max_new_tokens=2)
    with pytest.raises(TrainingDataError, match="prompts is empty"):
        sample_preferences(tiny_model, tokenizer, [], length_reward, config)

    def nan_reward(texts):
        return [float("nan")] * len(texts)

    with pytest.raises(TrainingDataError, match="nan"):
        sample_preferences(tiny_model, tokenizer, ["the"], nan_reward, config)


def test_best_meets_worst() -> None:
    def sample(text: str, reward: float) -> dict[str, object]:
        return {"prompt": "p", "response": text, "reward": reward}

    samples = [sample("b", 40.0), sample("d", -40.0), sample("a", 90.0), sample("c", 0.0)]
    samples.append(sample("e", -90.0))
    pairs = ranked_pairs(samples, 0, 50.0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("a", "e"), ("b", "d")]
