# SPDX-License-Identifier: Apache-2.0
"""The family as shipped: small, safe to load, and able to tell praise from blame."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from ivg_fast.assets import imdb_path
from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, data
from ivg_fast.training.evaluate import final_values, implicit_values
from ivg_fast.training.rewards import GoldReward
from ivg_fast.training.sft import perplexity
from ivg_fast.training.value_model import PrefixValueModel

GOOD = {
    "prompt": "This movie is",
    "response": " wonderful. I loved every minute of this great film",
}
BAD = {"prompt": "This movie is", "response": " awful. It was a boring waste of time and so bad"}


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer(imdb_path() / "base")


def test_files_are_small_and_safe():
    files = [file for file in imdb_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 48 * 2**20
    assert {file.suffix for file in files} <= {".json", ".jsonl", ".md", ".npz", ".safetensors"}


def test_one_vocabulary_and_half_precision(tokenizer):
    for name in ("base", "untuned", "tuned", "value"):
        assert common.load_tokenizer(imdb_path() / name).get_vocab() == tokenizer.get_vocab()
        with safe_open(imdb_path() / name / "model.safetensors", "pt") as file:
            names = list(file.keys())
            assert {file.get_tensor(n).dtype for n in names} == {torch.float16}
        assert ("score_head.weight" in names) == (name == "value")


def test_language_models_know_reviews(tokenizer):
    text = ["I have seen this movie many times and I think it is one of the best films ever made."]
    values = {}
    for name in ("base", "untuned", "tuned"):
        values[name] = perplexity(common.load_model(imdb_path() / name), tokenizer, text)
    assert values["base"] < values["untuned"] < 150
    assert values["tuned"] < 500
    sizes = [common.load_model(imdb_path() / name).num_parameters() for name in ("base", "untuned")]
    assert sizes[0] > 3 * sizes[1]


def test_all_judges_prefer_praise(tokenizer):
    records = [GOOD, BAD]
    models = [common.load_model(imdb_path() / name) for name in ("tuned", "untuned")]
    value = PrefixValueModel.load(imdb_path() / "value")
    texts = [record["prompt"] + record["response"] for record in records]
    for good, bad in (
        GoldReward.load().score(texts),
        final_values(value, tokenizer, records),
        implicit_values(*models, tokenizer, records),
    ):
        assert good > bad


def test_prompts():
    test, dev = data.test_prompts(300), data.dev_prompts(100)
    assert len(set(test) | set(dev)) == 400
    assert all(3 <= len(prompt.split(" ")) <= 6 for prompt in test + dev)
    assert data.test_prompts(7) == test[:7]
    with pytest.raises(InvalidParameterError, match="n must be in"):
        data.test_prompts(301)
    with pytest.raises(InvalidParameterError, match="n must be in"):
        data.dev_prompts(0)
