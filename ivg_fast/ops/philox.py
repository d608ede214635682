# SPDX-License-Identifier: Apache-2.0
"""The addressed uniform: one number per (seed, candidate id, response index), from Philox4x32-10.

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2,
3" (SC 2011). Nothing is consumed: equal addresses give equal numbers, on every device and in every
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IntArray = Tensor | np.ndarray | Sequence[int] | int

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
_LOW = 0xFFFFFFFF


def as_int64(values: IntArray, device: torch.device | str | None = None) -> Tensor:
    """Integers as an int64 tensor; unsigned 64-bit values keep their bits.

    Args:
        values: an integer tensor or array of any width, a sequence of ints, or one int, each in
            [-2^63, 2^64).
        device: where the tensor goes; None: where the values are.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype == object or array.dtype.kind == "f":
            # numpy makes floats or objects of ints on both sides of 2^63.
            flat = np.asarray(values, dtype=object).ravel()
            if not all(isinstance(value, int | np.integer) for value in flat):
                raise TypeError(f"integers are needed, got {array.dtype} values")
            wrapped = [int(value) & 0xFFFFFFFFFFFFFFFF for value in flat]
            array = np.array(wrapped, dtype=np.uint64).reshape(array.shape)
        if array.dtype == np.uint64:
            array = array.view(np.int64)
        values = torch.from_numpy(np.array(array, dtype=np.int64))
    elif values.dtype == torch.uint64:
        values = values.view(torch.int64)
    return values.to(device=device, dtype=torch.int64)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape that hold 32-bit words.
        key: two such tensors.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        # The products wrap modulo 2^64, which is what is wanted of their halves.
        left = c0 * MULTIPLIERS[0]
        right = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _LOW) ^ c1 ^ k0,
            right & _LOW,
            ((left >> 32) & _LOW) ^ c3 ^ k1,
            left & _LOW,
        )
        k0 = (k0 + WEYL[0]) & _LOW
        k1 = (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(
    seeds: IntArray, candidate_ids: IntArray, positions: IntArray, stream: int = 0
) -> Tensor:
    """The uniform at an address: (x0 + 0.5) * 2^-32, x0 the first word of Philox4x32-10.

    The key is the seed's 64 bits, the counter (candidate id, position, stream, 0).

    Args:
        seeds: 64-bit values; an int64 tensor holds them by reinterpretation, numpy may say uint64.
        candidate_ids: non-negative, below 2^32.
        positions: 0-based response indices, below 2^32.
        stream: a tag below 2^32 that separates independent uses of one address.

    The three arrays are broadcast together.

    Returns:
        float64, of the broadcast shape, strictly between 0 and 1, on the device of the first tensor
        among the arguments.
    """
    device = next(
        (a.device for a in (seeds, candidate_ids, positions) if isinstance(a, Tensor)), None
    )
    seed, candidate, position = torch.broadcast_tensors(
        as_int64(seeds, device), as_int64(candidate_ids, device), as_int64(positions, device)
    )
    counter = (
        candidate & _LOW,
        position & _LOW,
        torch.full_like(seed, stream),
        torch.zeros_like(seed),
    )
    first = philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))[0]
    return (first.to(torch.float64) + 0.5) * 2.0**-32
