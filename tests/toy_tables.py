# SPDX-License-Identifier: Apache-2.0
"""Toy models whose next-token distribution is a table of the last token: known by looking at it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch


class TableModel(torch.nn.Module):
    """Logits [V] of the next token: row `last token` of a table [V, V]."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.num_forwards = 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        self.num_forwards += 1
        rows = self.table[input_ids]
        return SimpleNamespace(logits=rows, last_hidden_state=rows)


class TableValue(torch.nn.Module):
    """Value of `token` after `last`: entry [last, token] of a table [V, V].

    The hidden state is the one-hot of the last token, so the head's weight is the transpose.
    """

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        size = table.shape[0]
        self.backbone = TableModel(torch.eye(size, dtype=table.dtype))
        self.score_head = torch.nn.Linear(size, size, bias=False, dtype=table.dtype)
        with torch.no_grad():
            self.score_head.weight.copy_(table.T)


class LetterTokenizer:
    """Token i is `pieces[i]`; the end of text decodes to nothing."""

    def __init__(self, pieces: Sequence[str], eos_token_id: int | None) -> None:
        self.pieces = pieces
        self.eos_token_id = eos_token_id

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        skipped = self.eos_token_id if skip_special_tokens else None
        return "".join(self.pieces[i] for i in ids if i != skipped)
