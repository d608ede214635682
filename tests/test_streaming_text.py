# SPDX-License-Identifier: Apache-2.0
"""Text of a stream: never taken back, equal to the whole response's at the end."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_cases import fresh_seed
from test_stop_strings import TEXT, TOKENIZERS
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivg_fast.request import before_stop, decode, find_stop
from ivg_fast.streaming import TextStream, TokenKinds


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Pieces with a space in front, which the text's first one loses, and bytes: as Llama-2."""
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    pieces += [*"abdefinorvöß5▁", "▁a", "▁de", "▁no", "▁▁", "▁vör", "<s>", "</s>"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<unk>"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*fallback, decoders.Strip(content=" ", left=1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def metaspaces() -> PreTrainedTokenizerFast:
    pieces = [*"abdefinorvöß5▁", "▁a", "▁de", "▁no", "▁vör", "</s>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


KINDS = {
    **TOKENIZERS,
    "sentence pieces": sentence_pieces(),
    "metaspaces": metaspaces(),
    "letters": tiny_tokenizer(),
}
SEED = fresh_seed()


def random_tokens(rng: random.Random, kind: str, longest: int = 300) -> list[int]:
    """Text of several alphabets, or anything at all, broken characters included."""
    tokenizer: Any = KINDS[kind]
    ids: list[int] = []
    length = rng.randint(1, longest)
    while len(ids) < length:
        if rng.random() < 0.5 and kind in TOKENIZERS:
            start = rng.randrange(len(TEXT))
            ids += tokenizer(TEXT[start : start + rng.randint(1, 12)]).input_ids
        else:
            low = rng.choice([0, 0, max(0, len(tokenizer) - 20)])
            ids += [rng.randrange(low, len(tokenizer)) for _ in range(rng.randint(1, 6))]
    return ids[:length]


def pieces(rng: random.Random, ids: list[int]) -> list[list[int]]:
    parts = []
    while ids:
        n = rng.choice([1, 1, 1, 2, 4, 16])
        parts.append(ids[:n])
        ids = ids[n:]
    return parts


def said_in_pieces(stream: TextStream, parts: list[list[int]], text: str) -> str:
    """All that the stream says; each piece must be a part of what the whole text says there."""
    said = ""
    for part in parts:
        said += stream.push(part)
        assert text.startswith(said), f"seed {SEED}"
    return said + stream.finish(text)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_text(kind: str) -> None:
    rng, tokenizer = random.Random(f"{SEED} {kind}"), KINDS[kind]
    kinds = TokenKinds.of(tokenizer)
    for _ in range(150):
        ids = random_tokens(rng, kind)
        text = decode(tokenizer, ids)
        stream = TextStream(tokenizer, kinds)
        assert said_in_pieces(stream, pieces(rng, ids), text) == text


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_are_never_said(kind: str) -> None:
    """As the engine does it: at the stop the response ends, and its last token is not pushed."""
    rng, tokenizer = random.Random(f"{SEED} stops {kind}"), KINDS[kind]
    kinds = TokenKinds.of(tokenizer)
    num_stopped = 0
    for _ in range(150):
        ids = random_tokens(rng, kind, 60)
        whole = decode(tokenizer, ids)
        if not whole:
            continue
        stops = []
        for _ in range(rng.choice([1, 1, 2])):
            start = rng.randrange(len(whole))
            stops.append(whole[start : start + rng.choice([1, 2, 3, 6])])
        min_tokens = rng.choice([0, 0, 20])
        found = find_stop(tokenizer, ids, 0, stops, min_tokens)
        stream = TextStream(tokenizer, kinds, stops)
        if found is None:
            assert said_in_pieces(stream, pieces(rng, ids), whole) == whole
            continue
        num_stopped += 1
        end, index = found
        said = "".join(stream.push(part) for part in pieces(rng, ids[: end - 1]))
        cut = before_stop(tokenizer, ids[:end], stops[index])
        assert cut.startswith(said), f"seed {SEED}: {said!r} {cut!r} {stops!r}"
        assert said + stream.finish(cut) == cut
    assert num_stopped > 60


def test_how_much_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, TokenKinds.of(tokenizer), ["ab\ncd", "€5"])
    said = [stream.push(tokenizer(part).input_ids) for part in ("xa", "b", "\nx", "€", "€", "6")]
    assert said == ["x", "", "ab\nx", "", "€", "€6"]
    one, two, three = tokenizer("€").input_ids
    stream = TextStream(tokenizer, TokenKinds.of(tokenizer))
    assert [stream.push([t]) for t in (one, two, three)] == ["", "", "€"]


def test_a_run_of_bytes_is_held_back_until_it_ends() -> None:
    """Its decoder turns all of it into replacement characters if it ends in half a character."""
    tokenizer = TOKENIZERS["byte fallback"]
    kinds = TokenKinds.of(tokenizer)
    assert len(kinds.bytes) == 256
    letter = tokenizer.convert_tokens_to_ids("a")
    whole = [tokenizer.convert_tokens_to_ids(p) for p in ("<0xC3>", "<0xA9>")]
    half = tokenizer.convert_tokens_to_ids("<0xE4>")
    stream = TextStream(tokenizer, kinds)
    assert [stream.push(p) for p in ([letter], whole, [letter])] == ["a", "", "éa"]
    stream = TextStream(tokenizer, kinds)
    said = [stream.push(p) for p in ([letter], whole, [half], [letter])]
    assert said == ["a", "", "", "\ufffd\ufffd\ufffda"]
    naive = TextStream(tokenizer, TokenKinds())  # the control: bytes as if each had its say
    said = "".join(naive.push(p) for p in ([letter], whole, [half]))
    assert not decode(tokenizer, [letter, *whole, half]).startswith(said)


def test_what_is_decoded_again_is_bounded(monkeypatch) -> None:
    tokenizer: Any = tiny_tokenizer()
    longest = 0
    real = tokenizer.decode

    def spy(ids, **options):
        nonlocal longest
        longest = max(longest, len(ids))
        return real(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", spy)
    rng = random.Random(SEED)
    ids = [rng.randrange(90) for _ in range(3000)]
    stream = TextStream(tokenizer, TokenKinds.of(tokenizer))
    said = "".join(stream.push([t]) for t in ids)
    assert said == real(ids)
    assert longest <= 66


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, TokenKinds.of(None))
    assert stream.push([1, 2]) == ""
    assert stream.finish("") == ""
