# SPDX-License-Identifier: Apache-2.0
"""Small requests that pay what the first real ones would: allocations, caches, compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from ivg_fast.params import Guidance, SearchParams

if TYPE_CHECKING:
    from ivg_fast.engine import Engine

WARMUP_PROMPT = (0, 0)


def warm_up(engine: Engine) -> None:
    """Runs every kind of request that the engine serves, alone and together."""
    kinds = [params for params in warmup_params() if engine.can_serve(params)]
    for params in kinds:
        engine.generate([WARMUP_PROMPT], params)
    engine.generate([WARMUP_PROMPT] * len(kinds), kinds)


def warmup_params() -> Iterator[SearchParams]:
    """A request of each kind of guidance and scorer: a single candidate, and a search with forks.

    Between them they run every form of batch: whole prompts, one row, several, whole chunks.
    """
    kinds: tuple[Guidance, ...] = get_args(Guidance)
    for guidance in kinds:
        for scorer in kinds:
            single = SearchParams(
                max_tokens=3, guidance=guidance, scorer=scorer, ignore_eos=True, seed=0
            )
            yield single
            if scorer != "none":
                yield replace(single, max_tokens=5, beam_width=2, num_candidates=2, chunk_length=2)
