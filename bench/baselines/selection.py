# SPDX-License-Identifier: Apache-2.0
"""The host's part of chunk-level beam search for one prompt: hypotheses, ranks, finished clones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ivg_fast.params import SearchParams


@dataclass(slots=True)
class Hypothesis:
    """One response so far.

    Attributes:
        token_ids: sampled tokens.
        score: of the last selection.
        is_finished: ended by a stop token.
        source: flat index of the leaf that it came from, in the batch of the last chunk.
    """

    token_ids: list[int] = field(default_factory=list)
    score: float = 0.0
    is_finished: bool = False
    source: int = 0


class PromptSearch:
    """The survivors of one prompt, best first."""

    def __init__(self, params: SearchParams) -> None:
        self._width = params.beam_width
        self._fanout = params.num_candidates
        self.survivors = [Hypothesis()]

    @property
    def active(self) -> list[int]:
        """Ranks of the survivors that go on."""
        return [rank for rank, kept in enumerate(self.survivors) if not kept.is_finished]

    def select(self, leaves: Sequence[Sequence[Hypothesis]]) -> None:
        """Keeps the best W of the children of the active survivors and the finished ones' clones.

        Args:
            leaves: for each active survivor, in order of rank, its children. Child c of rank r has
                id c*W + r; ties in score go to the lower id.
        """
        pool = [
            (-child.score, number * self._width + rank, child)
            for rank, children in zip(self.active, leaves, strict=True)
            for number, child in enumerate(children)
        ]
        for rank, kept in enumerate(self.survivors):
            if kept.is_finished:
                clones = (number * self._width + rank for number in range(self._fanout))
                pool += [(-kept.score, clone, kept) for clone in clones]
        pool.sort(key=lambda entry: entry[:2])
        self.survivors = [hypothesis for _, _, hypothesis in pool[: self._width]]
