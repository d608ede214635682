# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer trained on the texts at hand, saved in the Hugging Face format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ivg_fast.errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, model_max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` pieces; id 0 is `<|endoftext|>` (EOS, BOS and pad)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise InvalidParameterError("vocab_size", vocab_size, "must be >= 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
