# SPDX-License-Identifier: Apache-2.0
"""The naive search's uniform, filters and draw."""

from __future__ import annotations

import numpy as np
import pytest
from naive_search import draw, filtered, log_softmax, philox_uniform

from ivg_fast.ops.philox import uniform
from ivg_fast.params import SearchParams


def test_uniform_is_that_of_the_op() -> None:
    generator = np.random.default_rng()
    for _ in range(200):
        seed = int(generator.integers(0, 2**64, dtype=np.uint64))
        candidate, position = (int(x) for x in generator.integers(0, 2**32, 2))
        assert philox_uniform(seed, candidate, position) == float(
            uniform(seed, candidate, position)
        )


def test_draw_is_the_inverse_of_the_cumulative_mass() -> None:
    z = np.log([0.5, 0.125, 0.125, 0.25])
    params = SearchParams(max_tokens=1)
    for u, token, gap in (
        (0.1, 0, 0.4),
        (0.499, 0, 0.001),
        (0.5625, 1, 0.0625),
        (0.7, 2, 0.05),
        (0.8, 3, 0.05),
    ):
        drawn, logprob, distance = draw(z, params, u)
        assert drawn == token
        assert logprob == pytest.approx(z[token])
        assert distance == pytest.approx(gap)


def test_temperature_zero_is_the_lowest_of_the_largest() -> None:
    params = SearchParams(max_tokens=1, temperature=0.0)
    z = np.array([1.0, 3.0, 3.0, 0.0])
    token, logprob, gap = draw(z, params, 0.999)
    assert (token, gap) == (1, 0.0)
    assert logprob == pytest.approx(log_softmax(z)[1])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1, 2}),  # 1 and 2 are equal: both at least the 2nd largest
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_k": 50}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1, 2}),
        ({"top_p": 0.81}, {0, 1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.49}, {0, 1, 2}),
        ({"min_p": 0.249}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        # 0.4 of the 0.8 that top-k leaves is a half: top-p sees the renormalised mass.
        ({"top_k": 3, "top_p": 0.49}, {0}),
        ({"temperature": 0.5, "min_p": 0.24}, {0, 1, 2}),
    ],
)
def test_filters(options: dict[str, float], kept: set[int]) -> None:
    z = np.log([0.4, 0.2, 0.2, 0.1, 0.1 - 1e-3])
    p, gap = filtered(z, SearchParams(max_tokens=1, **options))
    assert set(np.flatnonzero(p)) == kept
    assert gap > 1e-4


def test_filters_report_the_nearest_border() -> None:
    z = np.log([0.4, 0.3, 0.3 - 1e-7])
    for options in ({"top_k": 2}, {"top_p": 0.7 - 1e-7}, {"min_p": 0.75}):
        assert filtered(z, SearchParams(max_tokens=1, **options))[1] < 1e-6


def test_draws_follow_the_filtered_distribution() -> None:
    params = SearchParams(max_tokens=1, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
    generator = np.random.default_rng()
    z = generator.normal(size=8) * 1.5
    p = filtered(z, params)[0]
    expected = p / p.sum()
    num_draws = 4000
    seed = int(generator.integers(2**63))

    def chi_square(temperature: float) -> float:
        options = SearchParams(
            max_tokens=1, temperature=temperature, top_k=5, top_p=0.9, min_p=0.05
        )
        draws = [draw(z, options, philox_uniform(seed, i, 7))[0] for i in range(num_draws)]
        counts = np.bincount(draws, minlength=8)
        assert not counts[expected == 0].any() or temperature != 0.7
        some = expected > 0
        wanted = expected[some] * num_draws
        return float(((counts[some] - wanted) ** 2 / wanted).sum())

    # Below 1e-6 by chance for at most seven degrees of freedom; a wrong temperature is far beyond.
    limit = 42.0
    assert chi_square(0.7) < limit
    if (expected > 0.02).sum() > 1:
        assert chi_square(1.4) > limit or expected.max() > 0.97
