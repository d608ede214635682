# SPDX-License-Identifier: Apache-2.0
"""Gap sentences: of each review the sentence most like the rest becomes its gist (PEGASUS's idea).

The gist is taken out of the text, so that it cannot be copied from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ivg_fast.training.imdb import Review

EXCERPT_WORDS = 150
MIN_WORDS, MAX_WORDS = 6, 25  # of a gist
MIN_SENTENCES = 4
_ENDS = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z])")


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Gist:
    """A text of whole sentences, at most EXCERPT_WORDS words, and the gist that was taken out."""

    text: str
    gist: str


def sentences(text: str) -> list[str]:
    """Sentences by their final marks; an abbreviation may end one too early."""
    return [part for part in (piece.strip() for piece in _ENDS.split(text)) if part]


def excerpt(text: str, num_words: int = EXCERPT_WORDS) -> list[str]:
    """The first whole sentences of a text, at most `num_words` words in all."""
    found: list[str] = []
    count = 0
    for sentence in sentences(text):
        count += len(sentence.split())
        if count > num_words:
            break
        found.append(sentence)
    return found


def _is_candidate(sentence: str) -> bool:
    return MIN_WORDS <= len(sentence.split()) <= MAX_WORDS


def gists(reviews: Sequence[Review], encoder: Encoder) -> list[Gist]:
    """A gist of each review that has MIN_SENTENCES sentences, a candidate of gist length among
    them; others are left out.

    The gist is the candidate whose vector is nearest to the sum of the other sentences' vectors.
    """
    found = []
    excerpts = [excerpt(review.text) for review in reviews]
    kept = [own for own in excerpts if len(own) >= MIN_SENTENCES and any(map(_is_candidate, own))]
    flat = [sentence for own in kept for sentence in own]
    if not flat:
        return []
    vectors = encoder.encode(flat)
    begin = 0
    for own in kept:
        mine = vectors[begin : begin + len(own)]
        begin += len(own)
        rest = mine.sum(0) - mine
        likeness = (mine * rest).sum(-1) / np.maximum(np.linalg.norm(rest, axis=-1), 1e-9)
        likeness[[not _is_candidate(sentence) for sentence in own]] = -np.inf
        best = int(likeness.argmax())
        text = " ".join(s for i, s in enumerate(own) if i != best)
        if own[best] not in text:
            found.append(Gist(text, own[best]))
    return found
