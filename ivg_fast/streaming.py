# SPDX-License-Identifier: Apache-2.0
"""Text of tokens that come a few at a time: what has been said is never taken back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivg_fast.request import NOT_WHOLE, decode

_LOG = logging.getLogger("ivg_fast")

# Tokens that are decoded again at each push, at least and at most where text is whole.
_WINDOW = (16, 64)


@dataclass(frozen=True, slots=True)
class TokenKinds:
    """What a tokenizer's ids stand for.

    Attributes:
        bytes: byte pieces of a byte-fallback tokenizer, which decodes each run of them as one: all
            of it becomes replacement characters if its end is no whole character.
        special: ids that are left out of the text.
    """

    bytes: frozenset[int] = frozenset()
    special: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any) -> TokenKinds:
        if tokenizer is None:
            return cls()
        vocab = tokenizer.get_vocab()
        pieces = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        ids = frozenset(piece for piece in pieces if piece is not None)
        first, second = pieces[0xC3], pieces[0xA9]
        is_fallback = (
            first is not None and second is not None and decode(tokenizer, [first, second]) == "é"
        )
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token_id for token_id, token in added.items() if token.special}
        return cls(ids if is_fallback else frozenset(), frozenset(special))


class TextStream:
    """Detokenises a response as it grows.

    Held back are the bytes of a character, or of a run of byte pieces, that is not whole yet, and
    text that may still become a stop string. What `push` and `finish` return adds up to the text of
    the output.

    Args:
        tokenizer: None: there is no text.
        kinds: TokenKinds.of(tokenizer).
        stops: the request's stop strings.
    """

    def __init__(self, tokenizer: Any, kinds: TokenKinds, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._kinds = kinds
        self._stops = stops
        self._tokens: list[int] = []
        self._first = 0  # of the tokens that are decoded again
        self._before = ""  # the text of those before them
        self._said = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain; the one that ends a response is not for here."""
        self._tokens += token_ids
        if self._tokenizer is None:
            return ""
        text = self._whole_text()
        text = text[: len(text) - self._num_in_stop(text)]
        if len(text) <= len(self._said) or not text.startswith(self._said):
            return ""
        new = text[len(self._said) :]
        self._said = text
        return new

    def finish(self, text: str) -> str:
        """What is left of the response's text."""
        if not text.startswith(self._said):  # no decoder that we know of does that
            _LOG.warning("a decoder has rewritten the text of tokens before those it was given")
            return ""
        return text[len(self._said) :]

    def _whole_text(self) -> str:
        end = len(self._tokens)
        while end > self._first and self._may_be_cut(self._tokens[end - 1]):
            end -= 1
        text = self._before + decode(self._tokenizer, self._tokens[self._first : end])
        shortest, longest = _WINDOW
        if end - self._first > longest:
            # A decoder may treat its first piece in a way of its own: only what is the same without
            # the pieces before it can do without them.
            tail = decode(self._tokenizer, self._tokens[end - shortest : end])
            if tail and NOT_WHOLE not in tail and text.endswith(tail):
                self._first = end - shortest
                self._before = text[: -len(tail)]
        return text.rstrip(NOT_WHOLE)

    def _may_be_cut(self, token_id: int) -> bool:
        return token_id in self._kinds.bytes or token_id in self._kinds.special

    def _num_in_stop(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
