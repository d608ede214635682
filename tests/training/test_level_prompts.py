# SPDX-License-Identifier: Apache-2.0
"""Prompts of one length, whatever their texts are."""

from __future__ import annotations

import random

import pytest

from ivg_fast.assets import imdb_path
from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common
from ivg_fast.training.level_prompts import level_prompt
from ivg_fast.training.summary_reward import CUE

WORDS = ["the", "film", "was", "great,", "awful;", "(mostly)!", "Ünlike", "any-thing", "we've"]


@pytest.fixture(scope="module")
def tokenizer():
    return common.load_tokenizer(imdb_path() / "untuned")


def test_every_prompt_has_the_length(tokenizer) -> None:
    rng = random.Random(random.SystemRandom().getrandbits(32))
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 200))) for _ in range(60)]
    lengths = []
    for text in texts:
        prompt = level_prompt(tokenizer, text, CUE, 90)
        lengths.append(len(tokenizer(prompt)["input_ids"]))
        assert prompt.endswith(CUE)
        kept = prompt.removesuffix(CUE).lstrip(" .")
        assert text == kept or text.startswith(kept + " ")
    assert all(87 <= length <= 92 for length in lengths), lengths
    plain = [len(tokenizer(text + CUE)["input_ids"]) for text in texts]
    assert max(plain) - min(plain) > 100  # the check of the check: they differ without it


def test_a_text_of_the_length_stays(tokenizer) -> None:
    text = "the film was great"
    size = len(tokenizer(text + CUE)["input_ids"])
    assert level_prompt(tokenizer, text, CUE, size) == text + CUE


def test_no_room_is_refused(tokenizer) -> None:
    with pytest.raises(InvalidParameterError, match=r"num_tokens.*2"):
        level_prompt(tokenizer, "the film", CUE, 2)
