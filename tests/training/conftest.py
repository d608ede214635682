# SPDX-License-Identifier: Apache-2.0
"""A toy tokenizer, toy models and toy data."""

from __future__ import annotations

import random

import pytest

from ivg_fast.training.sft import new_gpt2
from ivg_fast.training.tokenizer import train_tokenizer

_WORDS = [
    "the",
    "film",
    "was",
    "great",
    "awful",
    "boring",
    "lovely",
    "plot",
    "actor",
    "scene",
    "and",
    "but",
    "very",
    "not",
    "so",
    "it",
    "is",
]


def make_texts(count: int, seed: int, num_words: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=num_words)) + f" {i}" for i in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(120, 0)


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, 300, 64)


@pytest.fixture
def tiny_model(tokenizer):
    return new_gpt2(tokenizer, 1, 32, 64)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    new_gpt2(tokenizer, 1, 32, 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def samples(texts):
    """(prompt, response, reward) records whose reward is the count of "great" minus "awful"."""
    records = []
    for text in texts:
        words = text.split(" ")
        prompt, response = " ".join(words[:3]), " " + " ".join(words[3:20])
        reward = float(response.count("great") - response.count("awful"))
        records.append({"prompt": prompt, "response": response, "reward": reward})
    return records


@pytest.fixture(scope="session")
def pairs(samples):
    records = []
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        won, lost = (first, second) if first["reward"] >= second["reward"] else (second, first)
        records.append(
            {"prompt": first["prompt"], "chosen": won["response"], "rejected": lost["response"]}
        )
    return records
