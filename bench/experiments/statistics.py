# SPDX-License-Identifier: Apache-2.0
"""Statistics of the comparison: intervals, diversity, and how far a method goes from the base.

**KL to the base.** The reference is the base as it is sampled, at the method's temperature, so
that the base's own distance is 0. A method draws tokens from a proposal q (the base itself, or the
tilted distribution) and may select among what it drew; with pi the base,

    KL(method || pi) = KL(method || q) + E_method[log q(y) - log pi(y)].

The second term is the mean log-ratio of the responses, an unbiased estimate. The first is 0 without
a search. With one it has no cheap estimate, but a bound: see `selection_bound`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ivg_fast import SearchParams


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct runs of `n` words within a text, mean over the texts that have one."""
    shares = []
    for text in texts:
        words = text.split()
        runs = list(zip(*(itertools.islice(words, i, None) for i in range(n)), strict=False))
        if runs:
            shares.append(len(set(runs)) / len(runs))
    return float(np.mean(shares)) if shares else math.nan


def bootstrap(values: NDArray[np.float64], seed: int = 0, draws: int = 10_000) -> list[float]:
    """95% percentile interval of the mean of a value per prompt, by resampling prompts.

    For a paired comparison the values are differences on the same prompts.
    """
    rng = np.random.default_rng(seed)
    index = rng.integers(0, len(values), (draws, len(values)))
    return np.quantile(values[index].mean(-1), [0.025, 0.975]).tolist()


def selection_bound(params: SearchParams) -> float:
    """An upper bound, in nats, of KL(search || the proposal that it draws from).

    Among N independent draws, whatever picks one, P(pick in A) <= 1 - (1 - q(A))^N for every set A,
    so the pick's density majorises no more than best-of-N's and its KL is at most
    log N - (N - 1) / N (Beirami et al., arXiv 2401.01879, for best-of-N itself).

    CBS(W, K, L) with m selections returns one of the N = W * K^m paths of the tree that it would
    grow without pruning. Each is a draw of q; siblings share their beginning, which by Jensen only
    makes it less likely that any path is in A: the bound holds with this N. For W = 1 the chain
    rule over chunks, each a best-of-K, gives m * (log K - (K - 1) / K), which is smaller.
    """
    width, children = params.beam_width, params.num_candidates
    if width * children == 1 or params.scorer == "none":
        return 0.0
    chunk = params.chunk_length or params.max_tokens
    num_selections = math.ceil(params.max_tokens / chunk)
    if width == 1:
        return num_selections * best_of_n_bound(math.log(children))
    return best_of_n_bound(math.log(width) + num_selections * math.log(children))


def best_of_n_bound(log_n: float) -> float:
    """log N - (N - 1) / N for N = exp(log_n)."""
    return log_n - 1 + math.exp(-log_n)


def perplexity(logprobs: Sequence[float], num_tokens: Sequence[int]) -> float:
    """exp of the mean negative log-probability of a token, over all responses."""
    return math.exp(-math.fsum(logprobs) / sum(num_tokens))
