# SPDX-License-Identifier: Apache-2.0
"""Rewards of texts: the gold sentiment reward (log-odds) and a lexicon as second judge.

`GoldReward` is TF-IDF over words and word pairs with logistic regression. scikit-learn fits it;
scoring needs numpy and the standard library alone, and its file holds plain arrays, no pickle.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ivg_fast.assets import imdb_path
from ivg_fast.errors import InvalidParameterError

_WORD = re.compile(r"\b\w\w+\b")


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]


class GoldReward:
    """Sentiment log-odds: logit(positive) - logit(negative), higher is more positive.

    Features are (1 + log count) * idf of each known term, scaled to unit length.
    """

    def __init__(
        self,
        terms: Sequence[str],
        idf: NDArray[np.float32],
        coefficients: NDArray[np.float32],
        intercept: float,
    ) -> None:
        if not len(terms) == len(idf) == len(coefficients):
            raise InvalidParameterError(
                "(terms, idf, coefficients)",
                (len(terms), len(idf), len(coefficients)),
                "must have one length",
            )
        self._index = {term: i for i, term in enumerate(terms)}
        self._idf = np.asarray(idf, np.float64)
        self._coefficients = np.asarray(coefficients, np.float64)
        self._intercept = float(intercept)

    @property
    def num_terms(self) -> int:
        return len(self._index)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Log-odds of each text; a text without a known term gets the intercept."""
        if isinstance(texts, str):
            raise InvalidParameterError("texts", texts, "must be a list of strings")
        return [self._score(text) for text in texts]

    __call__ = score

    def _score(self, text: str) -> float:
        counts = Counter(i for i in map(self._index.get, _terms(text)) if i is not None)
        if not counts:
            return self._intercept
        index = np.fromiter(counts.keys(), np.int64, len(counts))
        features = (1 + np.log(np.fromiter(counts.values(), np.float64, len(counts)))) * (
            self._idf[index]
        )
        total = float(features @ self._coefficients[index]) / float(np.linalg.norm(features))
        return total + self._intercept

    @classmethod
    def fit(
        cls, texts: Sequence[str], labels: Sequence[int], max_terms: int = 60_000, c: float = 8.0
    ) -> GoldReward:
        """Fit on texts with labels 0 and 1. Needs scikit-learn."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        if set(labels) != {0, 1}:
            raise InvalidParameterError("labels", sorted(set(labels))[:5], "must be 0 and 1")
        vectorizer = TfidfVectorizer(
            analyzer=_terms, sublinear_tf=True, min_df=2, max_features=max_terms, dtype=np.float32
        )
        model = LogisticRegression(C=c, solver="liblinear").fit(
            vectorizer.fit_transform(texts), labels
        )
        return cls(
            vectorizer.get_feature_names_out().tolist(),
            vectorizer.idf_.astype(np.float32),
            model.coef_[0].astype(np.float32),
            float(model.intercept_[0]),
        )

    def save(self, path: str | Path) -> None:
        """Write an .npz of plain arrays, whole or not at all; coefficients and idf in float16."""
        part = Path(path).with_suffix(".part.npz")
        np.savez_compressed(
            part,
            terms=np.frombuffer("\n".join(self._index).encode("utf-8"), np.uint8),
            idf=self._idf.astype(np.float16),
            coefficients=self._coefficients.astype(np.float16),
            intercept=np.float64(self._intercept),
        )
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path | None = None) -> GoldReward:
        """Read a saved reward; without `path` the one shipped with the package."""
        with np.load(path or imdb_path() / "gold_reward.npz", allow_pickle=False) as arrays:
            terms = arrays["terms"].tobytes().decode("utf-8").split("\n")
            return cls(terms, arrays["idf"], arrays["coefficients"], float(arrays["intercept"]))


class LexiconReward:
    """Compound sentiment in [-1, 1] of the VADER lexicon: a judge that no training here sees."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, texts: Sequence[str]) -> list[float]:
        """Compound score of each text."""
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]

    __call__ = score


def accuracy(scores: Sequence[float], labels: Sequence[int], threshold: float = 0.0) -> float:
    """Share of scores on the right side of `threshold` (label 1 above it)."""
    if not scores or len(scores) != len(labels):
        raise InvalidParameterError("scores", len(scores), f"must be {len(labels)}, one a label")
    hits = (np.asarray(scores) > threshold) == (np.asarray(labels) == 1)
    return float(hits.mean())
