# SPDX-License-Identifier: Apache-2.0
"""Fixed-length training rows from texts of any length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ivg_fast.errors import InvalidParameterError


def pack(
    documents: Sequence[Sequence[int]],
    block_size: int,
    eos_token_id: int,
    seed: int,
    epochs: int = 1,
) -> NDArray[np.int32]:
    """Rows int32[num_rows, block_size], each of which starts at the start of a document.

    Documents are shuffled anew for every epoch and joined with EOS until a row is full; what does
    not fit the row is dropped. So position 0 means "the text starts here", as it does when the
    model is prompted, there is no padding, and another epoch cuts other documents short.
    """
    if block_size < 2:
        raise InvalidParameterError("block_size", block_size, "must be >= 2")
    rng = np.random.default_rng(seed)
    rows: list[NDArray[np.int32]] = []
    for _ in range(epochs):
        parts: list[Sequence[int]] = []
        length = 0
        for index in rng.permutation(len(documents)):
            parts += [documents[index], [eos_token_id]]
            length += len(documents[index]) + 1
            if length >= block_size:
                rows.append(np.concatenate(parts)[:block_size].astype(np.int32))
                parts, length = [], 0
    if not rows:
        raise InvalidParameterError(
            "block_size", block_size, "must be at most the number of tokens of the texts"
        )
    return np.stack(rows)
