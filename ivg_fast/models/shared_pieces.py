# SPDX-License-Identifier: Apache-2.0
"""Token guidance across tokenizers whose vocabularies share pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from ivg_fast.errors import InvalidParameterError, VocabularyMismatchError
from ivg_fast.models.vocabulary import check_same_vocabulary

logger = logging.getLogger("ivg_fast")

GuideVocabulary = Literal["same", "shared_pieces"]

# The logit of an id that the guides have no piece for: exp of it is 0 in every dtype, and it is the
# same in both guides, so that their difference there is 0.
_NOTHING = -1e4
_SPECIAL = ("eos_token_id", "bos_token_id", "unk_token_id", "pad_token_id")


class SharedPieces:
    """How a guide with a vocabulary of its own reads and judges the base model's tokens.

    A base id means the guide's id of the same piece, character by character (so "▁the" of one
    SentencePiece vocabulary is "▁the" of another; a byte-level "Ġthe" is not). Ends of text,
    beginnings, unknown and padding tokens mean each other, whatever they are called. The guide's
    distribution is taken over the ids that both have, and normalised there:

        logits[y] = log_softmax over shared ids of the guide's logits      y shared
        logits[y] = the same for every guide                               y of the base alone

    so the tilt tuned - untuned of a token that the guides have no piece for is exactly 0, and its
    implicit reward 0 but for rounding: it is neither favoured nor shunned by itself, whatever the
    guides say of the others.

    Each base token is one token to the guide. It reads its own unknown token (without one: its
    begin or end of text) where the base has drawn a piece that it lacks, also where it could have
    spelt that piece in bytes or in shorter pieces: a text is not tokenised again (a value model's
    is, see TextValueModel). So what a guide says after many such tokens is worth little; `share` of
    the base's ids, which says how many it has, is a lower bound of the share of tokens in most
    texts, as common pieces are the shared ones.

    The guide's own ids stand behind the base's, from `num_base_ids` on: it reads its prompts in
    them.

    Attributes:
        num_base_ids: V, ids of the base.
        num_input_ids: V + ids of the guide.
        share: of the base's pieces, those that the guide has.
    """

    def __init__(
        self,
        base_tokenizer: Any,
        guide_tokenizer: Any,
        num_base_ids: int,
        num_guide_ids: int,
        *,
        min_share: float,
        role: str,
    ) -> None:
        base = _pieces(base_tokenizer, num_base_ids)
        guide = _pieces(guide_tokenizer, num_guide_ids)
        shared = _shared_ids(base_tokenizer, guide_tokenizer, base, guide)
        self.num_base_ids = num_base_ids
        self.num_input_ids = num_base_ids + num_guide_ids
        self.share = len(shared) / len(base)
        if self.share < min_share:
            raise VocabularyMismatchError(
                f"{role} has {len(shared)} of the base model's {len(base)} pieces, a share of "
                f"{self.share:.3f}; min_shared_pieces is {min_share}"
            )
        eos = getattr(base_tokenizer, "eos_token_id", None)
        if eos is not None and eos not in shared:
            raise VocabularyMismatchError(f"{role} has no end of text, which the base model has")
        unknown = _unknown_id(guide_tokenizer, num_guide_ids, role)
        read = torch.full((self.num_input_ids,), unknown)
        self._base_ids = torch.tensor(sorted(shared))
        self._guide_ids = torch.tensor([shared[i] for i in sorted(shared)])
        read[self._base_ids] = self._guide_ids
        read[num_base_ids:] = torch.arange(num_guide_ids)
        self._read = read

    def place(self, device: torch.device) -> None:
        """Moves what it looks up to the guide's device."""
        for name in ("_base_ids", "_guide_ids", "_read"):
            setattr(self, name, getattr(self, name).to(device))

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The guide's ids for i64 ids of any shape, the base's or its own behind them."""
        return self._read[input_ids]

    def judge(self, logits: torch.Tensor) -> torch.Tensor:
        """f32 [N, V] over the base's ids, of the guide's logits [N, V']."""
        own = logits.index_select(1, self._guide_ids).float().log_softmax(-1)
        out = own.new_full((len(own), self.num_base_ids), _NOTHING)
        out[:, self._base_ids] = own
        return out


def checked_guide_vocabulary(kind: Any, min_shared_pieces: Any) -> None:
    """InvalidParameterError unless it is a GuideVocabulary, and the share one in (0, 1]."""
    if kind not in ("same", "shared_pieces"):
        raise InvalidParameterError("guide_vocabulary", kind, "must be 'same' or 'shared_pieces'")
    is_number = isinstance(min_shared_pieces, int | float)
    if not is_number or isinstance(min_shared_pieces, bool) or not 0 < min_shared_pieces <= 1:
        raise InvalidParameterError(
            "min_shared_pieces", min_shared_pieces, "must be a number in (0, 1]"
        )


def share_pieces(
    runners: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    min_share: float,
    put_behind: Callable[[str, int], None],
) -> dict[str, float]:
    """Has the guides whose vocabulary is not the base's read and judge its ids by their pieces.

    Args:
        runners: ModelRunners by role.
        tokenizers: by role; those of the base and of every guide.
        min_share: see SharedPieces.
        put_behind: of the PromptRenderer.

    Returns:
        By role, the share of the base's pieces that such a guide has; {} where the vocabularies are
        one.

    Raises:
        InvalidParameterError: a tokenizer is missing, or a value lives on such a guide's trunk.
        VocabularyMismatchError: too few pieces, or guides that differ from each other.
    """
    base = runners["base"]
    guides = [role for role in ("tuned", "untuned") if role in runners]
    missing = [role for role in ("base", *guides) if tokenizers.get(role) is None]
    if missing:
        raise InvalidParameterError(
            "tokenizers", missing, "must be given for all with guide_vocabulary 'shared_pieces'"
        )
    found: dict[str, SharedPieces] = {}
    for role in guides:
        own, size = tokenizers[role], runners[role].vocab_size
        try:
            check_same_vocabulary(tokenizers["base"], own, base.vocab_size, size, other_name=role)
        except VocabularyMismatchError as mismatch:
            logger.info("%s reads by its pieces: %s", role, mismatch)
            found[role] = SharedPieces(
                tokenizers["base"], own, base.vocab_size, size, min_share=min_share, role=role
            )
            logger.info("%s has %.1f%% of the base's pieces", role, 100 * found[role].share)
    if found:
        vocabularies = [tokenizers[role].get_vocab() for role in guides]
        if len(found) < len(guides) or vocabularies[0] != vocabularies[-1]:
            raise VocabularyMismatchError("tuned and untuned must have one vocabulary")
        if "value" in runners and runners["value"].shares_trunk_with(runners["tuned"]):
            wanted = "must not be on the trunk of a model with another vocabulary"
            raise InvalidParameterError("value", "tuned", wanted)
    for role, pieces in found.items():
        runners[role].use_pieces(pieces)
        put_behind(role, pieces.num_base_ids)
    return {role: pieces.share for role, pieces in found.items()}


def _pieces(tokenizer: Any, num_ids: int) -> dict[str, int]:
    return {piece: i for piece, i in tokenizer.get_vocab().items() if i < num_ids}


def _shared_ids(
    base_tokenizer: Any, guide_tokenizer: Any, base: Mapping[str, int], guide: Mapping[str, int]
) -> dict[int, int]:
    """The guide's id of each base id that it has; no two have the same."""
    known = set(base.values()), set(guide.values())
    shared: dict[int, int] = {}
    taken: set[int] = set()
    for name in _SPECIAL:
        ours, theirs = (getattr(t, name, None) for t in (base_tokenizer, guide_tokenizer))
        if ours is None or theirs is None:
            continue
        is_there = ours in known[0] and theirs in known[1]
        if is_there and ours not in shared and theirs not in taken:
            shared[ours] = theirs
            taken.add(theirs)
    for piece, i in base.items():
        other = guide.get(piece)
        if i not in shared and other is not None and other not in taken:
            shared[i] = other
            taken.add(other)
    return shared


def _unknown_id(tokenizer: Any, num_ids: int, role: str) -> int:
    """What a guide reads for a piece that it lacks."""
    for name in ("unk_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None and token < num_ids:
            return token
    raise VocabularyMismatchError(f"{role} has no token for a piece that it lacks")
