# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.packing import pack


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_whole_documents_cut_once(seed):
    rng = np.random.default_rng(seed)
    documents = [[1000 * (i + 1) + j for j in range(rng.integers(1, 30))] for i in range(60)]
    rows = pack(documents, 16, 0, seed, epochs=2)
    assert rows.shape[1] == 16
    for row in rows.tolist():
        pieces, piece = [], []
        for token in row:
            if token == 0:
                pieces.append(piece)
                piece = []
            else:
                piece.append(token)
        for whole in pieces:
            assert whole in documents
        if piece:  # the last document may be cut, from its start on
            document = documents[piece[0] // 1000 - 1]
            assert document[: len(piece)] == piece
        assert row[0] % 1000 == 0


def test_epochs_differ_and_seeds_repeat():
    documents = [[i] * 7 for i in range(1, 40)]
    rows = pack(documents, 8, 0, 3, epochs=2)
    half = len(rows) // 2
    assert (rows[:half] != rows[half:]).any()
    assert (pack(documents, 8, 0, 3, epochs=2) == rows).all()


def test_too_few_tokens_are_refused():
    with pytest.raises(InvalidParameterError, match="block_size"):
        pack([[1, 2], [3]], 16, 0, 0)
