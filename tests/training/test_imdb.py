# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv

import pytest

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import imdb


def write_csv(path, rows, columns=("text", "label", "source")):
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


@pytest.fixture
def reviews_csv(tmp_path):
    rows = [
        (f"Review number {i} <br /><br />was  fine, really.", i % 2, "imdb") for i in range(400)
    ]
    rows += [("Review number 3 was fine, really.", 1, "imdb")]  # a duplicate once cleaned
    rows += [("a snippet .", 1, "rotten_tomatoes")]
    return write_csv(tmp_path / "reviews.csv", rows)


def test_reviews_are_cleaned_and_distinct(reviews_csv):
    reviews = imdb.load_reviews(reviews_csv)
    texts = [review.text for review in reviews]
    assert len(texts) == len(set(texts)) == 400
    assert not any("<br" in text or "  " in text for text in texts)


def test_splits_are_disjoint_and_depend_on_the_text_alone(reviews_csv, tmp_path):
    reviews = imdb.load_reviews(reviews_csv)
    of = {review.text: review.split for review in reviews}
    assert {*of.values()} == set(imdb.SPLITS)
    shuffled = [(review.text, review.label, "imdb") for review in reversed(reviews)]
    again = imdb.load_reviews(write_csv(tmp_path / "shuffled.csv", shuffled))
    assert {review.text: review.split for review in again} == of


def test_prompts_open_their_reviews_and_honour_exclude(reviews_csv):
    reviews = imdb.load_reviews(reviews_csv)
    test_texts = [review.text for review in reviews if review.split == "test"]
    prompts = imdb.prompts_of(reviews, "test")
    assert len(prompts) == len(set(prompts))
    for prompt in prompts:
        assert 3 <= len(prompt.split(" ")) <= 6
        assert any(text.startswith(prompt) for text in test_texts)
    excluded = frozenset(prompts[:1])
    assert imdb.prompts_of(reviews, "test", excluded) == prompts[1:]


def test_unusable_csv_is_refused(tmp_path):
    with pytest.raises(InvalidParameterError, match="must be a file"):
        imdb.load_reviews(tmp_path / "absent.csv")
    with pytest.raises(InvalidParameterError, match="label"):
        imdb.load_reviews(write_csv(tmp_path / "a.csv", [("x", "imdb")], ("text", "source")))
    with pytest.raises(InvalidParameterError, match="imdb"):
        imdb.load_reviews(write_csv(tmp_path / "b.csv", [("x", 1, "elsewhere")]))
