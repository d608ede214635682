# SPDX-License-Identifier: Apache-2.0
"""Which pairs of vocabularies may share token ids."""

from __future__ import annotations

import pytest
from tiny_models import EOS_PIECE, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ivg_fast.errors import InvalidParameterError, VocabularyMismatchError
from ivg_fast.models.vocabulary import check_same_vocabulary


def tokenizer_of(pieces: list[str | None], eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer with that piece at each id; None leaves the id without one."""
    vocab = {piece: i for i, piece in enumerate(pieces) if piece is not None}
    core = Tokenizer(WordLevel(vocab, unk_token=pieces[0]))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)


PIECES: list[str | None] = ["<unk>", "</s>", "a", "b", "c", "d"]


def test_the_same_tokenizer() -> None:
    tokenizer = tokenizer_of(PIECES)
    assert check_same_vocabulary(tokenizer, tokenizer_of(PIECES), 6, 6) == 6
    assert check_same_vocabulary(tokenizer, None, 6, 6) == 6


def test_padded_embeddings_are_tolerated_and_left_out() -> None:
    """32,016 against 32,001 rows for 32,000 pieces is the everyday case."""
    for other in (tokenizer_of(PIECES), None):
        assert check_same_vocabulary(tokenizer_of(PIECES), other, 16, 8) == 6
        assert check_same_vocabulary(tokenizer_of(PIECES), other, 8, 16) == 6


def test_a_pad_token_at_the_end_of_one() -> None:
    padded = tokenizer_of(PIECES)
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert check_same_vocabulary(tokenizer_of(PIECES), padded, 6, 7) == 6
    assert check_same_vocabulary(padded, tokenizer_of(PIECES), 7, 6) == 6
    # Both models have a row for it, so it can be scored and stays.
    assert check_same_vocabulary(padded, tokenizer_of(PIECES), 8, 8) == 7


def test_another_piece_in_the_middle() -> None:
    other = tokenizer_of([*PIECES[:3], "B", *PIECES[4:]])
    with pytest.raises(VocabularyMismatchError, match=r"token id 3 is 'b' .* 'B' in tuned"):
        check_same_vocabulary(tokenizer_of(PIECES), other, 6, 6, other_name="tuned")


def test_the_first_difference_is_named() -> None:
    other = tokenizer_of(["<unk>", "</s>", "a", "c", "b", "e"])
    with pytest.raises(VocabularyMismatchError, match=r"token id 3 "):
        check_same_vocabulary(tokenizer_of(PIECES), other, 6, 6)


def test_equal_sizes_of_different_families() -> None:
    """Mistral's and Llama-2's 32,000 ids, or byte-level against sentencepiece marks."""
    byte_level = tokenizer_of(["<unk>", "</s>", "Ġa", "Ġb"])
    sentencepiece = tokenizer_of(["<unk>", "</s>", "▁a", "▁b"])
    with pytest.raises(VocabularyMismatchError, match=r"token id 2 is 'Ġa' .* '▁a'"):
        check_same_vocabulary(byte_level, sentencepiece, 4, 4)


def test_two_special_tokens_at_one_id_differ() -> None:
    ends, pads = tokenizer_of(PIECES), tokenizer_of(PIECES)
    ends.add_special_tokens({"eos_token": "<|im_end|>"})
    pads.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(VocabularyMismatchError, match=r"token id 6 is '<\|im_end\|>' .* '<pad>'"):
        check_same_vocabulary(ends, pads, 7, 7)


@pytest.mark.parametrize("sizes", [(7, 6), (7, 7)])
def test_an_ordinary_piece_that_only_one_has(sizes: tuple[int, int]) -> None:
    longer, shorter = tokenizer_of([*PIECES, "e"]), tokenizer_of(PIECES)
    with pytest.raises(VocabularyMismatchError, match=r"token id 6 is 'e' .* nothing in"):
        check_same_vocabulary(longer, shorter, *sizes)
    with pytest.raises(VocabularyMismatchError, match=r"token id 6 is nothing .* 'e' in"):
        check_same_vocabulary(shorter, longer, *reversed(sizes))


def test_a_model_too_small_for_its_tokenizer() -> None:
    with pytest.raises(VocabularyMismatchError, match=r"token id 4 is 'c' .* nothing in"):
        check_same_vocabulary(tokenizer_of(PIECES), None, 6, 4)


def test_the_end_of_text_must_be_shared() -> None:
    base = tokenizer_of(PIECES)
    base.add_special_tokens({"eos_token": "<|im_end|>"})
    assert check_same_vocabulary(base, tokenizer_of(PIECES), 7, 7) == 7
    with pytest.raises(VocabularyMismatchError, match=r"token id 6, the end of text"):
        check_same_vocabulary(base, tokenizer_of(PIECES), 7, 6)


def test_tiny_tokenizer_has_every_id() -> None:
    tokenizer = tiny_tokenizer(120)
    assert sorted(tokenizer.get_vocab().values()) == list(range(120))
    assert tokenizer.convert_ids_to_tokens(119) == EOS_PIECE
    assert check_same_vocabulary(tokenizer, tiny_tokenizer(120), 120, 128) == 120


def test_a_tokenizer_without_a_vocabulary() -> None:
    with pytest.raises(InvalidParameterError, match="get_vocab"):
        check_same_vocabulary(object(), None, 6, 6)
