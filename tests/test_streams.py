# SPDX-License-Identifier: Apache-2.0
"""Streams against their outputs: characters of several tokens, stop strings, searches."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from async_cases import checked, collect, serve
from engine_cases import fresh_seed, text_score
from test_stop_strings import TEXT, TOKENIZERS, Recites
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import AsyncEngine, Engine, EngineConfig, InvalidParameterError, SearchParams

SEED = fresh_seed()
CONFIG = {"num_blocks": 2000, "num_threads": 1, "max_burst_steps": 4, "max_stream_steps": 2}


def make_engine(tokenizer: Any, **config: Any) -> Engine:
    model = tiny_model("gpt2", seed=SEED, vocab_size=300, eos_token_id=None)
    return Engine(model, tokenizer, config=EngineConfig(**{**CONFIG, **config}))


@pytest.mark.parametrize("steps", [1, 2, 16])
@pytest.mark.parametrize("stop", ["", "done", "。\n"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_of_several_alphabets(kind: str, stop: str, steps: int) -> None:
    tokenizer = TOKENIZERS[kind]
    engine = make_engine(tokenizer, max_stream_steps=steps)
    ids = tokenizer(TEXT.replace(" ", "▁") if kind == "byte fallback" else TEXT).input_ids
    engine._runners["base"].model.lm_head = Recites(ids, 300)
    params = SearchParams(max_tokens=len(ids), temperature=0.0, stop=stop or ())

    async def clients(served: AsyncEngine) -> None:
        events = await collect(served, [1, 2], params)
        assert checked(events).outputs[0].text == (TEXT.split(stop)[0] if stop else TEXT)
        assert len(events) > (20 if steps < 16 else 2)
        assert not any("\ufffd" in event.text for event in events)

    serve(engine, clients)


def random_params(rng: random.Random, tokenizer: Any) -> SearchParams:
    """Stop strings of one or two pieces, such as even random text says now and then."""
    stops = []
    for _ in range(rng.choice([0, 1, 2, 3])):
        piece = tokenizer.decode([rng.randrange(len(tokenizer)) for _ in range(rng.choice([1, 2]))])
        stops.append(piece)
    beam_width, num_candidates = rng.choice([(1, 1), (1, 1), (1, 3), (2, 2), (3, 1)])
    is_search = beam_width * num_candidates > 1
    return SearchParams(
        max_tokens=rng.randint(1, 60),
        beam_width=beam_width,
        num_candidates=num_candidates,
        chunk_length=rng.choice([None, 1, 3, 7]) if is_search else None,
        scorer=text_score if is_search else "none",
        # Cold enough that candidates often say the same.
        temperature=rng.choice([0.05, 0.3, 1.0]),
        stop=[stop for stop in stops if stop],
        min_tokens=rng.choice([0, 0, 1]),
        dedup_finished=rng.random() < 0.5,
        seed=rng.randrange(2**32),
    )


@pytest.mark.parametrize("kind", [*TOKENIZERS, "letters"])
def test_random_streams_add_up(kind: str) -> None:
    """`checked` holds each stream against its output; searches decide before their end too."""
    rng = random.Random(f"{SEED} {kind}")
    tokenizer = TOKENIZERS[kind] if kind in TOKENIZERS else tiny_tokenizer(300)
    engine = make_engine(tokenizer, scorer_timeout_s=60.0)
    every = [random_params(rng, tokenizer) for _ in range(60)]

    async def clients(served: AsyncEngine) -> None:
        streams = await asyncio.gather(
            *(collect(served, [1, rng.randrange(90)], params) for params in every)
        )
        reasons = [checked(events).outputs[0].finish_reason for events in streams]
        assert {"stop", "length"} <= set(reasons), f"seed {SEED}"
        decided_early = [
            len(events) > 1
            for events, params in zip(streams, every, strict=True)
            if params.pool_size > 1
        ]
        assert sum(decided_early) >= 5, f"seed {SEED}"

    serve(engine, clients)


def test_a_stream_that_says_too_much_is_seen(monkeypatch) -> None:
    """The control: what the first candidate says, whoever else is in the pool."""
    num_taken: dict[int, int] = {}

    def planted(self: Engine, request_id: int) -> list[int]:
        try:
            said = self._scheduler.history(request_id, 0).tolist()
        except InvalidParameterError:
            return []
        new = said[num_taken.get(request_id, 0) :]
        num_taken[request_id] = len(said)
        return new

    monkeypatch.setattr(Engine, "take_decided", planted)
    params = SearchParams.cbs(
        max_tokens=12, beam_width=2, num_candidates=3, chunk_length=3, scorer=text_score
    )

    async def clients(served: AsyncEngine) -> list[Any]:
        return await asyncio.gather(*(collect(served, [1, i], params) for i in range(8)))

    num_seen = 0
    for events in serve(make_engine(tiny_tokenizer(300)), clients):
        try:
            checked(events)
        except AssertionError:
            num_seen += 1
    assert num_seen >= 3


def test_token_ids_alone() -> None:
    engine = make_engine(None)

    async def clients(served: AsyncEngine) -> None:
        events = await collect(served, [1, 2], SearchParams(max_tokens=9))
        assert [len(event.token_ids) for event in events] == [2, 2, 2, 2, 1]
        assert not any(event.text for event in events)
        checked(events)

    serve(engine, clients)


def test_decided_tokens_of_an_engine() -> None:
    params = SearchParams.cbs(
        max_tokens=12,
        beam_width=1,
        num_candidates=3,
        chunk_length=4,
        scorer=text_score,
        ignore_eos=True,
        seed=1,
    )
    with make_engine(tiny_tokenizer(300)) as engine:
        request_id = engine.add_request("hello", params)
        decided: list[int] = []
        ended: dict[int, Any] = {}
        while engine.has_unfinished:
            ended.update(engine.step())
            more = engine.take_decided(request_id)
            assert engine.take_decided(request_id) == []
            decided += more
        said = ended[request_id].outputs[0].token_ids
        assert decided == said[: len(decided)]
        assert len(decided) >= 8
        with pytest.raises(InvalidParameterError, match="request_id"):
            engine.take_decided(request_id + 1)


@pytest.mark.parametrize("value", [0, 1.5, None])
def test_bad_stream_steps(value: Any) -> None:
    with pytest.raises(InvalidParameterError, match="max_stream_steps"):
        EngineConfig(max_stream_steps=value)
