# SPDX-License-Identifier: Apache-2.0
"""What the official client gets is what Engine.generate returns."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from engine_cases import fresh_seed

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("openai", reason="needs the extra `test`")

from openai import AsyncOpenAI, NotFoundError
from serving import DEFAULTS, MODEL, Server, make_engine, serving

from ivg_fast import Engine, RequestOutput, SearchParams

# Each role says the same in another way.
CHAT = {
    role: "{% for m in messages %}" + sign + "{{ m['role'][0] + m['content'] }}{% endfor %}>"
    for role, sign in (("base", "+"), ("tuned", "**"), ("untuned", "-"), ("value", "/// "))
}
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "what"},
    {"role": "user", "content": "the end"},
]
SEARCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "eft": {"guidance": "implicit", "guidance_weight": 0.6, "temperature": 0.8},
    "greedy": {"guidance": "explicit", "temperature": 0},
    "cbs": {"beam_width": 2, "num_candidates": 3, "chunk_length": 4, "scorer": "implicit"},
    "ivg": {
        "beam_width": 2,
        "num_candidates": 2,
        "chunk_length": 3,
        "guidance": "implicit",
        "scorer": "explicit",
        "top_k": 40,
        "min_p": 0.001,
        "n": 3,
        "ignore_eos": True,
        "dedup_finished": True,
    },
    "best of n": {"num_candidates": 5, "scorer": "explicit", "stop": ["th", "q"], "top_p": 0.9},
}
OPENAI_FIELDS = ("temperature", "top_p", "n", "stop", "seed", "max_tokens")


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with make_engine(CHAT) as engine:
        yield engine


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(make_engine(CHAT)) as server:
        yield server


def split(search: dict[str, Any]) -> dict[str, Any]:
    """As keywords of the client: OpenAI's own, and ours in the body."""
    own = {k: v for k, v in search.items() if k in OPENAI_FIELDS}
    return {**own, "extra_body": {k: v for k, v in search.items() if k not in OPENAI_FIELDS}}


def check_choice(choice: Any, candidate: Any, text: str) -> None:
    info = choice.ivg if isinstance(choice.ivg, dict) else choice.ivg.model_dump()
    assert info["token_ids"] == candidate.token_ids
    assert info["score"] == pytest.approx(candidate.score, rel=1e-4, abs=1e-4)
    assert info["finish_reason"] == candidate.finish_reason
    assert info["stop_reason"] == candidate.stop_reason
    assert choice.finish_reason == ("stop" if candidate.finish_reason == "stop" else "length")
    assert text == candidate.text


def check_usage(usage: Any, outputs: list[RequestOutput]) -> None:
    assert usage.prompt_tokens == sum(len(o.prompt_token_ids) for o in outputs)
    assert usage.completion_tokens == sum(len(c.token_ids) for o in outputs for c in o.outputs)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("seed", [fresh_seed()])
@pytest.mark.parametrize("name", SEARCHES)
def test_completions(server: Server, alone: Engine, name: str, seed: int) -> None:
    rng = random.Random(seed)
    search = {**SEARCHES[name], "seed": rng.getrandbits(63), "max_tokens": rng.randint(5, 20)}
    params = SearchParams(**search)
    prompts: list[Any] = [
        "hello there",
        ["one", "the other one", "three"],
        [5, 6, 7],
        [[1], [2, 3]],
    ]
    for prompt in prompts:
        expected = alone.generate(prompt, params)
        got = server.client().completions.create(model=MODEL, prompt=prompt, **split(search))
        candidates = [c for output in expected for c in output.outputs]
        assert len(got.choices) == len(candidates)
        for choice, candidate in zip(got.choices, candidates, strict=True):
            check_choice(choice, candidate, choice.text)
        check_usage(got.usage, expected)
        for info, output in zip(got.ivg, expected, strict=True):
            assert info["seed"] == output.seed
            assert info["stats"]["num_selections"] == output.stats.num_selections
        check_stream(server, prompt, search, expected)


def check_stream(server: Server, prompt: Any, search: dict[str, Any], expected: Any) -> None:
    stream = server.client().completions.create(
        model=MODEL,
        prompt=prompt,
        stream=True,
        stream_options={"include_usage": True},
        **split(search),
    )
    *chunks, last = list(stream)
    n = search.get("n", 1)
    texts, ends = collect(chunks, lambda choice: choice.text)
    wanted = {i * n + j: c for i, o in enumerate(expected) for j, c in enumerate(o.outputs)}
    assert set(texts) == set(ends) == set(wanted)
    for index, candidate in wanted.items():
        check_choice(ends[index], candidate, texts[index])
    assert not last.choices
    check_usage(last.usage, expected)


def collect(chunks: list[Any], piece: Any) -> tuple[dict[int, str], dict[int, Any]]:
    """Texts and last choices by index; nothing may come behind the last."""
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] = texts.get(choice.index, "") + (piece(choice) or "")
            if choice.finish_reason is not None:
                ends[choice.index] = choice
    return texts, ends


@pytest.mark.parametrize("name", ["plain", "ivg"])
def test_chat(server: Server, alone: Engine, name: str) -> None:
    search = {**SEARCHES[name], "seed": 9, "max_tokens": 14}
    (expected,) = alone.generate([MESSAGES], SearchParams(**search))
    # The pair reads its own templates: with the base's the result is another.
    asked = split(search) | {"max_completion_tokens": search["max_tokens"]}
    del asked["max_tokens"]
    got = server.client().chat.completions.create(model=MODEL, messages=MESSAGES, **asked)
    assert [choice.index for choice in got.choices] == list(range(len(expected.outputs)))
    for choice, candidate in zip(got.choices, expected.outputs, strict=True):
        assert choice.message.role == "assistant"
        check_choice(choice, candidate, choice.message.content)
    check_usage(got.usage, [expected])

    chunks = list(
        server.client().chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, **asked
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts, ends = collect(chunks, lambda choice: choice.delta.content)
    assert len(texts) == len(expected.outputs)
    for index, candidate in enumerate(expected.outputs):
        check_choice(ends[index], candidate, texts[index])


def test_parts_and_names_of_roles(server: Server, alone: Engine) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    sent = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    meant = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    (expected,) = alone.generate([meant], SearchParams(max_tokens=9, seed=1))
    got = server.client().chat.completions.create(model=MODEL, messages=sent, seed=1, max_tokens=9)
    assert got.choices[0].message.content == expected.outputs[0].text


def test_async_clients_at_once(server: Server, alone: Engine) -> None:
    """Mixed requests together: each gets what it gets alone."""
    searches = [{**s, "seed": i, "max_tokens": 10} for i, s in enumerate(SEARCHES.values())] * 3
    expected = [alone.generate("the", SearchParams(**search))[0] for search in searches]

    async def one(client: AsyncOpenAI, search: dict[str, Any], *, is_streamed: bool) -> str:
        asked = split(search) | {"n": 1}
        if not is_streamed:
            got = await client.completions.create(model=MODEL, prompt="the", **asked)
            return got.choices[0].text
        stream = await client.completions.create(model=MODEL, prompt="the", stream=True, **asked)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> list[str]:
        url = f"{server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
            calls = [one(client, s, is_streamed=i % 2 == 0) for i, s in enumerate(searches)]
            return await asyncio.gather(*calls)

    assert asyncio.run(run()) == [output.outputs[0].text for output in expected]


def test_a_stream_comes_as_it_is_decided(server: Server) -> None:
    stream = server.client().completions.create(
        model=MODEL,
        prompt="hello",
        max_tokens=40,
        stream=True,
        seed=3,
        extra_body={"ignore_eos": True},
    )
    assert len([chunk for chunk in stream if chunk.choices[0].text]) >= 9


def test_n_without_a_search_is_independent_samples(server: Server, alone: Engine) -> None:
    params = SearchParams(max_tokens=12, num_candidates=4, n=4, seed=5)
    (expected,) = alone.generate("hello", params)
    got = server.client().completions.create(
        model=MODEL, prompt="hello", n=4, best_of=4, seed=5, max_tokens=12
    )
    assert [choice.text for choice in got.choices] == [c.text for c in expected.outputs]
    assert len({choice.text for choice in got.choices}) == 4


def test_what_is_not_said_is_the_servers(alone: Engine) -> None:
    defaults = SearchParams.ivg(max_tokens=9, chunk_length=3, seed=8, top_k=50)
    with serving(make_engine(), defaults=defaults) as server:
        client = server.client()
        cases = [
            ({}, defaults),
            ({"temperature": None, "user": "me"}, defaults),
            ({"max_tokens": 6, "seed": 2}, dataclasses.replace(defaults, max_tokens=6, seed=2)),
            ({"n": 2}, dataclasses.replace(defaults, n=2)),
            (
                {"extra_body": {"chunk_length": None}},
                dataclasses.replace(defaults, chunk_length=None),
            ),
        ]
        for asked, params in cases:
            (expected,) = alone.generate("hello", params)
            got = client.completions.create(model=MODEL, prompt="hello", **asked)
            assert [c.text for c in got.choices] == [c.text for c in expected.outputs]


def test_logprobs(server: Server, alone: Engine) -> None:
    (expected,) = alone.generate("hello", SearchParams(max_tokens=7, seed=4, logprobs=True))
    best = expected.outputs[0]
    asked = {"model": MODEL, "seed": 4, "max_tokens": 7}
    for given in (0, True):
        got = server.client().completions.create(prompt="hello", logprobs=given, **asked)
        found = got.choices[0].logprobs
        assert found.token_logprobs == pytest.approx(best.token_logprobs, abs=1e-4)
        pieces = [text for text in found.tokens if text != "<|endoftext|>"]
        assert "".join(pieces) == best.text
        assert found.text_offset[:3] == [0, len(found.tokens[0]), len("".join(found.tokens[:2]))]
        rewards = got.choices[0].ivg["token_rewards"]
        assert rewards == pytest.approx(best.token_rewards)
    chat = server.client().chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=0, **asked
    )
    (wanted,) = alone.generate([MESSAGES], SearchParams(max_tokens=7, seed=4, logprobs=True))
    content = chat.choices[0].logprobs.content
    assert [c.logprob for c in content] == pytest.approx(wanted.outputs[0].token_logprobs, abs=1e-4)
    without = server.client().completions.create(prompt="hello", **asked)
    assert without.choices[0].logprobs is None
    *_, last = server.client().completions.create(prompt="hello", logprobs=0, stream=True, **asked)
    assert last.choices[0].logprobs.token_logprobs == pytest.approx(best.token_logprobs, abs=1e-4)


def test_models_and_health(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == [MODEL]
    assert server.client().models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError, match="model must be 'tiny', got 'other'"):
        server.client().models.retrieve("other")
    assert requests.get(f"{server.url}/health").json() == {"status": "ok"}
    head = requests.head(f"{server.url}/health")
    assert (head.status_code, head.content) == (200, b"")


def test_a_planted_difference_is_seen(server: Server, alone: Engine) -> None:
    """The control of what is compared above: another seed gives other tokens."""
    (expected,) = alone.generate("hello", dataclasses.replace(DEFAULTS, seed=1))
    got = server.client().completions.create(model=MODEL, prompt="hello", seed=2)
    with pytest.raises(AssertionError):
        check_choice(got.choices[0], expected.outputs[0], got.choices[0].text)
