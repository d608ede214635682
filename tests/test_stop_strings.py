# SPDX-License-Identifier: Apache-2.0
"""Stop strings where a token is a byte: characters, and stops, that several tokens complete."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_cases import fresh_seed
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivg_fast import Engine, EngineConfig, SearchParams
from ivg_fast.request import decode, find_stop

TEXT = "我喜欢这部电影。Größe €5 — naïve 😀😀 done。\n日本語、です。"


def byte_level() -> PreTrainedTokenizerFast:
    """A piece a byte, as GPT-2 would have without merges."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Letters, and a piece a byte for everything else, as Llama-2 has."""
    pieces = [f"<0x{i:02X}>" for i in range(256)] + list("abdefinorvöß5▁")
    vocab = {piece: i for i, piece in enumerate([*pieces, "<unk>"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    replace = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


def first_end(tokenizer: Any, ids: Sequence[int], stop: str, min_tokens: int) -> int | None:
    """The number of tokens behind which the stop has just been completed, by whole characters."""
    before = ""  # the longest text so far that ends with a whole character
    for end in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:end])
        if text.endswith("\ufffd"):
            continue
        if end >= min_tokens and text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0:
            return end
        before = text
    return None


@pytest.mark.parametrize("seed", [fresh_seed()])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_stops_across_bytes_at_every_burst_length(kind: str, seed: int) -> None:
    rng, tokenizer = random.Random(seed), TOKENIZERS[kind]
    ids = tokenizer(TEXT.replace(" ", "▁") if kind == "byte fallback" else TEXT).input_ids
    assert decode(tokenizer, ids) == TEXT
    assert len(ids) > 1.5 * len(TEXT)
    for _ in range(80):
        start = rng.randrange(len(TEXT))
        stop = TEXT[start : start + rng.choice([1, 1, 2, 4])]
        min_tokens = rng.choice([0, 0, rng.randrange(len(ids))])
        wanted = first_end(tokenizer, ids, stop, min_tokens)
        for steps in (1, 3, 16, len(ids)):
            ends = range(0, len(ids), steps)
            found = (find_stop(tokenizer, ids[: n + steps], n, [stop], min_tokens) for n in ends)
            got = next((each for each in found if each is not None), None)
            assert got == (None if wanted is None else (wanted, 0)), (stop, steps, min_tokens)


class Recites(torch.nn.Module):
    """An LM head that says the given ids, one a call."""

    def __init__(self, ids: Sequence[int], width: int) -> None:
        super().__init__()
        self.ids, self.width, self.calls = ids, width, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.width)
        logits[..., self.ids[min(self.calls, len(self.ids) - 1)]] = 50.0
        self.calls += 1
        return logits


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("max_burst_steps", [1, 16])
def test_the_text_is_cut_before_a_stop_of_several_bytes(kind: str, max_burst_steps: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer("我喜欢。这部").input_ids
    model = tiny_model("gpt2", vocab_size=300, eos_token_id=None)
    config = EngineConfig(num_blocks=20, max_burst_steps=max_burst_steps)
    with Engine(model, tokenizer, config=config) as engine:
        model.lm_head = Recites(ids, 300)
        params = SearchParams(max_tokens=len(ids), temperature=0.0, stop="。")
        (output,) = engine.generate([[1, 2]], params)
    assert output.outputs[0].text == "我喜欢"
    assert output.outputs[0].stop_reason == "。"
    assert len(output.outputs[0].token_ids) == 12, "cut at the stop's last byte"
