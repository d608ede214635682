# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

import numpy as np
import pytest

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.rewards import GoldReward, accuracy


def labelled(seed: int, count: int = 300) -> tuple[list[str], list[int]]:
    rng = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = rng.randrange(2)
        mood = ["Great", "lovely", "not bad"] if label else ["awful", "boring", "not great"]
        words = rng.choices(["the film", "was", "a plot", "I", "actor's"], k=12)
        texts.append(" ".join([*words[:6], *rng.choices(mood, k=3), *words[6:]]))
        labels.append(label)
    return texts, labels


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learn(seed, tmp_path):
    """The numpy scorer against scikit-learn's own vectorizer and decision function."""
    text_module = pytest.importorskip(
        "sklearn.feature_extraction.text", reason="needs the extra `train`"
    )
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs the extra `train`")
    texts, labels = labelled(seed)
    held_out, _ = labelled(seed + 100)
    vectorizer = text_module.TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=2, dtype=np.float32
    )
    model = linear_model.LogisticRegression(C=8.0, solver="liblinear")
    model.fit(vectorizer.fit_transform(texts), labels)
    expected = model.decision_function(vectorizer.transform(held_out))
    gold = GoldReward.fit(texts, labels)
    np.testing.assert_allclose(gold.score(held_out), expected, atol=1e-4)
    # control: other texts score otherwise, so the comparison can fail
    assert np.abs(np.asarray(gold.score([t[::-1] for t in held_out])) - expected).max() > 0.1

    gold.save(tmp_path / "gold.npz")
    loaded = GoldReward.load(tmp_path / "gold.npz")
    assert loaded.num_terms == gold.num_terms
    np.testing.assert_allclose(loaded.score(held_out), expected, atol=2e-2)
    with np.load(tmp_path / "gold.npz", allow_pickle=False) as arrays:
        assert not any(arrays[name].dtype.hasobject for name in arrays.files)


def test_texts_without_known_terms_get_the_intercept():
    gold = GoldReward(["good"], np.ones(1), np.full(1, 2.0), -0.25)
    assert gold.score(["", "x", "Good"]) == [-0.25, -0.25, 1.75]
    assert gold.score([]) == []


def test_bad_input():
    gold = GoldReward(["good"], np.ones(1), np.ones(1), 0.0)
    with pytest.raises(InvalidParameterError, match="list of strings"):
        gold.score("good")
    with pytest.raises(InvalidParameterError, match="one length"):
        GoldReward(["good"], np.ones(2), np.ones(1), 0.0)
    with pytest.raises(InvalidParameterError, match="labels"):
        GoldReward.fit(["a", "b"], [1, 1])
    assert accuracy([1.0, -1.0, 2.0, -2.0], [1, 0, 0, 1]) == 0.5


def test_lexicon_orders_moods():
    pytest.importorskip("vaderSentiment", reason="needs the extra `train`")
    from ivg_fast.training.rewards import LexiconReward

    bad, good = LexiconReward()(["an awful, horrible film", "a great, wonderful film"])
    assert -1 <= bad < 0 < good <= 1
