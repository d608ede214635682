# SPDX-License-Identifier: Apache-2.0
"""The addressed uniform against the published known answers of Philox4x32-10."""

import numpy as np
import pytest
import torch

from ivg_fast.ops.philox import philox4x32, uniform

# (counter, key, output): the known answers distributed with the generator's reference library.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(word) for word in words) == expected


def test_uniform_is_the_first_word_of_the_address():
    seed, candidate, position, stream = 0x0123456789ABCDEF, 77, 12, 3
    counter = [torch.tensor([x]) for x in (candidate, position, stream, 0)]
    key = [torch.tensor([0x89ABCDEF]), torch.tensor([0x01234567])]
    expected = (int(philox4x32(counter, key)[0]) + 0.5) / 2**32
    assert float(uniform(seed, candidate, position, stream)) == expected


def test_seeds_keep_their_64_bits():
    big = 2**64 - 5
    expected = uniform(big, 1, 2)
    assert uniform(torch.tensor([-5]), [1], [2]) == expected
    assert uniform(np.array([big], dtype=np.uint64), np.array([1]), 2) == expected
    mixed = uniform([3, big, 2**63], 1, 2)
    assert mixed[1] == expected
    assert mixed[0] == uniform(3, 1, 2)
    assert mixed[2] == uniform(torch.tensor(-(2**63)), 1, 2)
    with pytest.raises(TypeError, match="integers"):
        uniform([0.5], 1, 2)


def test_uniform_is_inside_the_open_interval_and_flat():
    u = uniform(torch.arange(40)[:, None, None], torch.arange(50)[:, None], torch.arange(100))
    assert u.dtype == torch.float64
    assert u.shape == (40, 50, 100)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    counts = torch.histc(u.flatten(), bins=256, min=0, max=1)
    expected = u.numel() / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 6 * (2 * 255) ** 0.5 < chi2 < 255 + 6 * (2 * 255) ** 0.5
    # Neighbouring addresses are not correlated along any axis.
    for dim in range(3):
        a = u.narrow(dim, 0, u.shape[dim] - 1).flatten()
        b = u.narrow(dim, 1, u.shape[dim] - 1).flatten()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6 / len(a) ** 0.5
