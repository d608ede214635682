# SPDX-License-Identifier: Apache-2.0
"""A value model with a tokenizer of its own: it reads texts, and computes what is new in them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ivg_fast.errors import (
    CapacityError,
    InvalidParameterError,
    IVGError,
    VocabularyMismatchError,
)
from ivg_fast.models.batch import ForwardBatch
from ivg_fast.models.loading import load_tokenizer
from ivg_fast.models.prefix_cache import Placement, PrefixCache
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.value_head import ValueModel, as_value_model, load_value_model
from ivg_fast.models.values import TokenScorer
from ivg_fast.models.vocabulary import load_guide_tokenizer
from ivg_fast.ops.block_copy import BlockCopier
from ivg_fast.params import ScoreInput, check_integer

logger = logging.getLogger("ivg_fast")

_DEFAULT_NUM_BLOCKS = 512


class TextValueModel:
    """A ValueFunction: a value model whose token ids are not the base model's.

    It scores prompt + response, tokenised as one text, with its own end of text behind those that
    have ended: a vocabulary head the last token given those before it, a scalar head the hidden
    state at the last token. Special tokens that its tokenizer puts in front of a text (such as a
    beginning of text) are put there unless the text begins with them. Tokens that a text has in
    common with earlier ones are not computed again, whichever request these were of; the memory is
    bounded, what was used longest ago gives way.

    Args:
        model: as the `value` of an Engine; it runs only through this object until `close`.
        tokenizer: the model's own.
        num_blocks: KV blocks of 16 tokens; None: as many as the engine whose value it is gives its
            other models, or 512.

    Attributes:
        num_tokens_forwarded: tokens computed so far.
        is_closed: whether `close` was called; an engine whose `value` this is does when it closes.

    Raises:
        UnsupportedModelError: the model cannot be served.
        InvalidParameterError: a tokenizer without an end of text.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, *, num_blocks: int | None = None
    ) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise InvalidParameterError(
                "tokenizer", type(tokenizer).__name__, "must have an end-of-text token"
            )
        if num_blocks is not None:
            check_integer("num_blocks", num_blocks, 1)
        self.tokenizer = tokenizer
        self.is_closed = False
        self.num_tokens_forwarded = 0
        self.num_blocks = num_blocks
        self._prefix = _tokens_in_front(tokenizer)
        self.runner = ModelRunner(as_value_model(model), role="value")
        self._scorer = TokenScorer({"value": self.runner}, self.runner.vocab_size)
        self._cache: PrefixCache | None = None

    def allocate(self, num_blocks: int) -> None:
        """Makes the KV pools anew; every text is forgotten."""
        self.runner.allocate(num_blocks)
        self._cache = PrefixCache(num_blocks)
        self._copy = BlockCopier(self.runner.pools).copy
        self.num_blocks = num_blocks

    def close(self) -> None:
        """Frees the KV pools and gives the model its own attention back."""
        self.runner.close()
        self._cache = None
        self.is_closed = True
        vars(self).pop("_copy", None)

    def encode(self, item: ScoreInput) -> list[int]:
        """The token ids of what is scored."""
        ids = list(self.tokenizer(item.prompt + item.response, add_special_tokens=False).input_ids)
        if ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        return [*ids, self.tokenizer.eos_token_id] if item.ends_text else ids

    def __call__(self, inputs: list[ScoreInput], /) -> Sequence[float]:
        """The values of texts, in their order.

        Raises:
            CapacityError: a text that is longer than the model's positions, or than its KV pool.
            InvalidParameterError: a text without tokens.
        """
        if self.is_closed:
            raise IVGError("the value model is closed")
        if not inputs:
            return []
        texts = [self.encode(item) for item in inputs]
        for item, ids in zip(inputs, texts, strict=True):
            self._check(item, ids)
        if self.runner.is_scalar:
            contexts = [tuple(ids) for ids in texts]
        else:
            contexts = [tuple(ids[:-1]) for ids in texts]
        distinct = list(dict.fromkeys(contexts))
        states = self._states(distinct)
        row_of = {ids: row for row, ids in enumerate(distinct)}
        rows = np.array([row_of[ids] for ids in contexts], np.int64)
        if self.runner.is_scalar:
            return self._scorer.scalars(states)[rows].tolist()
        last = np.array([ids[-1] for ids in texts], np.int64)
        return self._scorer.scores("explicit", [states], rows, last).tolist()

    def _check(self, item: ScoreInput, ids: list[int]) -> None:
        limit = self.runner.max_position
        if limit is not None and len(ids) > limit:
            raise CapacityError(
                f"a text of {len(ids)} tokens exceeds the {limit} positions of value"
            )
        least = 1 if self.runner.is_scalar else 2
        if len(ids) < least:
            raise InvalidParameterError(
                "inputs", item.prompt + item.response, f"must have {least} tokens to have a value"
            )
        if max(ids) >= self.runner.vocab_size:
            raise InvalidParameterError(
                "inputs", max(ids), f"must be token ids below {self.runner.vocab_size}"
            )

    def _states(self, texts: list[tuple[int, ...]]) -> torch.Tensor:
        """Hidden states [N, H] at the last token of distinct texts."""
        if self._cache is None:
            self.allocate(self.num_blocks or _DEFAULT_NUM_BLOCKS)
        assert self._cache is not None
        parts: list[torch.Tensor] = []
        done = 0
        try:
            while done < len(texts):
                placed: list[Placement] = []
                self._cache.begin_round()
                for ids in texts[done:]:
                    placement = self._cache.take(ids)
                    if placement is None:
                        break
                    placed.append(placement)
                parts.append(self._forward(texts[done : done + len(placed)], placed))
                done += len(placed)
        except BaseException:
            self._cache.clear()  # what was to be computed is not there
            raise
        return torch.cat(parts)

    def _forward(self, texts: list[tuple[int, ...]], placed: list[Placement]) -> torch.Tensor:
        """Computes a round: the hidden state [N, H] at the last token of each text."""
        copies = [placement.copy for placement in placed if placement.copy]
        if copies:
            self._copy(np.array(copies, np.int32))
        batch = ForwardBatch.of_texts(
            texts,
            [placement.table for placement in placed],
            [placement.num_cached for placement in placed],
            device=self.runner.device,
        )
        self.num_tokens_forwarded += batch.input_ids.shape[1]
        return self.runner.hidden(batch)


def check_function(value: Any) -> None:
    """InvalidParameterError unless it can be called as a ValueFunction."""
    if not callable(value):
        raise InvalidParameterError("value", value, "must be a model or a ValueFunction")
    if isinstance(value, TextValueModel) and value.is_closed:
        raise InvalidParameterError("value", value, "must not be closed")


def _tokens_in_front(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    whole = list(tokenizer("a").input_ids)
    begins = range(len(whole) - len(plain) + 1)
    first = next((i for i in begins if whole[i : i + len(plain)] == plain), 0)
    return whole[:first]


def load_value(
    path: str | os.PathLike[str],
    base_tokenizer: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[ValueModel | TextValueModel, Any]:
    """A value model by `load_value_model`, through text where its token ids are not the base's; and
    its tokenizer, None where it has none."""
    model = load_value_model(path, device=device, dtype=dtype)
    try:
        return model, load_guide_tokenizer(base_tokenizer, path, "value")
    except VocabularyMismatchError as mismatch:
        logger.info("value %s scores texts: %s", os.fspath(path), mismatch)
        tokenizer = load_tokenizer(path)
        return TextValueModel(model, tokenizer), tokenizer
