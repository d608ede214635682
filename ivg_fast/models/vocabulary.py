# SPDX-License-Identifier: Apache-2.0
"""Whether two models mean the same by the same token ids."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ivg_fast.errors import InvalidParameterError, VocabularyMismatchError
from ivg_fast.models.loading import load_tokenizer

logger = logging.getLogger("ivg_fast")


def check_same_vocabulary(
    base_tokenizer: Any,
    other_tokenizer: Any | None,
    base_vocab_size: int,
    other_vocab_size: int,
    *,
    other_name: str = "the other model",
) -> int:
    """The number of ids [0, n) that both models can score and the base's tokenizer can name.

    An id must stand for the same piece wherever both tokenizers have it. Ids that one of them has
    no piece for are fine where the other's piece is an added or special one (a pad token put at the
    end, a chat marker); an ordinary piece that only one of them knows is a mismatch. Rows of
    embeddings past the last piece are padding: tolerated, and left out of the result.

    Args:
        base_tokenizer: the tokenizer of the base model, whose ids are sampled.
        other_tokenizer: the other model's; None says that it is the base's.
        base_vocab_size, other_vocab_size: ids that each model takes and scores.
        other_name: what to call the other model in errors.

    Raises:
        VocabularyMismatchError: names the first id that differs and its two pieces.
    """
    base_pieces, base_added = _pieces(base_tokenizer)
    size = min(base_vocab_size, other_vocab_size)
    if other_tokenizer is None or other_tokenizer is base_tokenizer:
        other_pieces, other_added = base_pieces, base_added
    else:
        other_pieces, other_added = _pieces(other_tokenizer)
    for token_id in sorted(base_pieces.keys() | other_pieces.keys()):
        base_piece, other_piece = base_pieces.get(token_id), other_pieces.get(token_id)
        if token_id >= size:
            # A model that ends before this id does not have its piece, whatever the tokenizer.
            base_piece = base_piece if token_id < base_vocab_size else None
            other_piece = other_piece if token_id < other_vocab_size else None
        if base_piece == other_piece:
            continue
        if base_piece is None and token_id in other_added:
            continue
        if other_piece is None and token_id in base_added:
            continue
        raise VocabularyMismatchError(
            f"token id {token_id} is {_name(base_piece)} in the base model but "
            f"{_name(other_piece)} in {other_name}; models that share token ids need one vocabulary"
        )
    size = min(size, max(base_pieces) + 1)
    eos = getattr(base_tokenizer, "eos_token_id", None)
    if eos is not None and eos >= size:
        raise VocabularyMismatchError(
            f"token id {eos}, the end of text in the base model, is past the {other_vocab_size} "
            f"ids of {other_name}"
        )
    return size


def ends_of_text(
    tokenizer: Any, of_model: Iterable[int], vocab_size: int
) -> tuple[list[int], int | None]:
    """The ids that end a text, by the base's tokenizer and model; the one that scoring appends.

    Raises:
        VocabularyMismatchError: none of them is among the ids that all models share.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    known = sorted({*of_model, *([] if eos is None else [eos])})
    # Of several ends of text some may be past what all models share: those are never drawn.
    eos_ids = [token for token in known if token < vocab_size]
    if known and not eos_ids:
        raise VocabularyMismatchError(
            f"token ids {known}, which end a text of the base model, are past the {vocab_size} ids "
            "that all models share"
        )
    return eos_ids, eos if eos is not None else next(iter(eos_ids), None)


def load_guide_tokenizer(
    base_tokenizer: Any,
    path: str | os.PathLike[str],
    role: str,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The tokenizer of a checkpoint after `check_same_vocabulary`; without one it warns: None."""
    try:
        other = load_tokenizer(path, model_kwargs)
    except (OSError, ValueError):
        logger.warning(
            "%s has no tokenizer at %s: its token ids are taken for the base's", role, path
        )
        return None
    size = max(len(base_tokenizer), len(other))
    check_same_vocabulary(base_tokenizer, other, size, size, other_name=role)
    return other


def _pieces(tokenizer: Any) -> tuple[dict[int, str], set[int]]:
    """Pieces by id, and the ids among them that are added or special."""
    try:
        pieces = {token_id: piece for piece, token_id in tokenizer.get_vocab().items()}
    except AttributeError:
        raise InvalidParameterError(
            "tokenizer",
            type(tokenizer).__name__,
            "must have get_vocab(), as those of transformers do",
        ) from None
    if not pieces:
        raise InvalidParameterError("tokenizer", type(tokenizer).__name__, "must have a vocabulary")
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    return pieces, added | set(getattr(tokenizer, "all_special_ids", ()))


def _name(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)


def shared_vocab_size(
    tokenizer: Any, num_ids: int, tokenizers: Mapping[str, Any], sizes: Mapping[str, int]
) -> int:
    """The ids that models share with the one of `num_ids` ids.

    Args:
        tokenizer: of those ids; None: nothing but sizes is known.
        num_ids: ids that it may have.
        tokenizers: by role, of models that have their own.
        sizes: ids of each model by role.

    Raises:
        VocabularyMismatchError: an id means another piece somewhere.
    """
    shared = [num_ids, *sizes.values()]
    if tokenizer is not None:
        shared += [
            check_same_vocabulary(tokenizer, tokenizers.get(role), num_ids, size, other_name=role)
            for role, size in sizes.items()
        ]
    return min(shared)
