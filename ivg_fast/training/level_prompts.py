# SPDX-License-Identifier: Apache-2.0
"""Prompts of one length, behind which a position says how long the response has become.

A small model with absolute positions hardly learns to count from wherever its prompt ends: values
of whole texts rank a summary of sixty words as they rank one of ten, and a search follows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivg_fast.errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILLER = " ."


def level_prompt(tokenizer: PreTrainedTokenizerBase, text: str, end: str, num_tokens: int) -> str:
    """`text` and `end` in `num_tokens` tokens, or one or two beside where words do not fit.

    A longer text is cut behind a word, a shorter one stands behind full stops.

    Args:
        tokenizer: a fast one.

    Raises:
        InvalidParameterError: `num_tokens` leaves no room for the text.
    """
    room = num_tokens - len(tokenizer(end, add_special_tokens=False)["input_ids"])
    if room < 1:
        raise InvalidParameterError("num_tokens", num_tokens, f"must leave room before {end!r}")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if len(found["input_ids"]) > room:
        begin = found["offset_mapping"][room][0]
        text = text[: begin + 1].rpartition(" ")[0] or text[:begin]
        found = tokenizer(text, add_special_tokens=False)
    missing = room - len(found["input_ids"])
    if missing > 0:
        text = FILLER * missing + " " + text
    return text + end
