# SPDX-License-Identifier: Apache-2.0
"""Bad input and failing parts: each has its own error, and nobody else notices."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    CapacityError,
    Engine,
    EngineConfig,
    InvalidParameterError,
    NonFiniteLogitsError,
    QueueFullError,
    RequestOutput,
    ScorerError,
    SearchParams,
    UnsupportedModelError,
    ValueHeadModel,
    VocabularyMismatchError,
)

PARAMS = SearchParams(max_tokens=12, seed=3)
NEIGHBOUR = SearchParams.cbs(
    max_tokens=13, beam_width=2, num_candidates=2, chunk_length=3, seed=11, n=4
)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {
        "base_model": tiny_model("gpt2", seed=1),
        "tuned": tiny_model("gpt2", seed=2),
        "untuned": tiny_model("gpt2", seed=3),
    }


@pytest.fixture
def engine(models) -> Iterator[Engine]:
    with Engine(tokenizer=tiny_tokenizer(), **models, config=EngineConfig(num_blocks=80)) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats()["num_blocks_used"] == 0, "blocks leaked"
        assert not engine.has_unfinished
        assert engine.generate("still here", PARAMS)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "parameter"),
    [
        ("", "prompts"),
        ([5, 97], "prompts"),
        ([5, -1], "prompts"),
        ([5, 1.5], "prompts"),
        ([5, 2**70], "prompts"),
        ([], "prompts"),
        (None, "prompts"),
        (5, "prompts"),
        (b"bytes", "prompts"),
        ("half a character \ud83d", "prompts"),
        ({"role": "user", "content": "one message is no list of them"}, "prompts"),
        ([{"role": "user", "content": "hi"}], "prompts"),  # this tokenizer has no chat template
    ],
)
def test_bad_prompts(engine: Engine, prompt, parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        engine.generate([[1, 2, 3], prompt], PARAMS)
    assert caught.value.parameter == parameter
    assert engine.stats()["num_requests_waiting"] == 0, "nothing may start before all is checked"


def test_position_limit(engine: Engine) -> None:
    assert engine.generate([[1] * 244], PARAMS)  # 244 + 12 = 256 positions
    with pytest.raises(CapacityError, match="245 tokens and max_tokens 12 exceed the 256"):
        engine.generate([[1] * 245], PARAMS)


def test_a_pool_too_small_for_the_request(engine: Engine) -> None:
    wide = SearchParams.cbs(max_tokens=200, beam_width=8, num_candidates=8, scorer="implicit")
    with pytest.raises(CapacityError, match="the pool has 80"):
        engine.generate("hello", wide)
    with pytest.raises(CapacityError, match="the pool has 80"):
        engine.generate(["hello"] * 2, [PARAMS, wide])
    assert engine.stats()["num_requests_waiting"] == 0, "nothing may start before all is checked"
    many = SearchParams.best_of_n(512, max_tokens=1, scorer="implicit")
    with pytest.raises(CapacityError, match="512 rows, max_num_rows is 256"):
        engine.generate("hello", many)


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 0},
        {"num_candidates": -1},
        {"beam_width": 10**9, "num_candidates": 10**9, "scorer": "implicit"},
        {"num_candidates": 10**6, "scorer": "implicit"},
        {"max_tokens": 0},
        {"max_tokens": 10**10},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": 1e-30},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"top_k": 2.5},
        {"guidance": "tilted"},
        {"scorer": "best"},
        {"guidance": "explicit"},  # the engine has no value model
        {"scorer": "explicit"},
        {"n": 2},
        {"stop": [""]},
        {"stop": None},
        {"stop_token_ids": [97]},
        {"stop_token_ids": None},
        {"min_tokens": 13},
        {"seed": 2**64},
        {"scorer": "none", "beam_width": 2, "chunk_length": 3},  # nothing to select by
        {"num_candidates": 2, "temperature": 0.0},  # identical clones
        {"deadline_s": -1.0},
        {"ignore_eos": 1},
    ],
)
def test_bad_params(engine: Engine, fields: dict) -> None:
    with pytest.raises((InvalidParameterError, CapacityError)) as caught:
        engine.generate("hello", SearchParams(**{"max_tokens": 12, **fields}))
    value = str(next(iter(fields.values())))
    assert any(name in str(caught.value) for name in fields), caught.value
    assert isinstance(caught.value, CapacityError) or value.strip("[]") in str(caught.value)


def test_stops_are_of_whole_characters() -> None:
    with pytest.raises(InvalidParameterError, match=r"stop must have no halves .* got \('half"):
        SearchParams(max_tokens=3, stop="half a \ud83d")


def test_lists_of_another_length(engine: Engine) -> None:
    with pytest.raises(InvalidParameterError, match="params must be one, or 2, got 3"):
        engine.generate(["a", "b"], [PARAMS] * 3)
    with pytest.raises(InvalidParameterError, match=r"params must be SearchParams, .* got None"):
        engine.generate(["a", "b"], None)
    with pytest.raises(InvalidParameterError, match="seeds must be a list of integers, got 1"):
        engine.generate(["a", "b"], PARAMS, seeds=1)
    with pytest.raises(InvalidParameterError, match="seeds must be 2"):
        engine.generate(["a", "b"], PARAMS, seeds=[1])
    with pytest.raises(InvalidParameterError, match=r"seeds must be integers .*, got -1"):
        engine.generate(["a", "b"], PARAMS, seeds=[1, -1])


@pytest.mark.parametrize("prompts", [None, 5, b"bytes", {"role": "user", "content": "hi"}])
def test_what_is_no_prompt_at_all(engine: Engine, prompts) -> None:
    with pytest.raises(InvalidParameterError, match="prompts must be texts, chat messages or"):
        engine.generate(prompts, PARAMS)


def test_errors_cross_processes() -> None:
    error = InvalidParameterError("seed", -1, "must be positive")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.parameter, copy.value) == (str(error), "seed", -1)


def test_stops_of_an_iterator_are_kept() -> None:
    params = SearchParams(max_tokens=3, stop=iter(["a", "b"]), stop_token_ids=iter([7]))
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (7,))


def _run_beside(engine: Engine, params: SearchParams) -> tuple[Exception, RequestOutput]:
    """Runs a request that fails beside a healthy one; the error, and what the healthy one gave."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is for the caller to judge
        engine.generate(["hello", "hello"], [params, NEIGHBOUR])
    error = caught.value
    assert error.outputs[0] is None
    return error, error.outputs[1]


def _same(a: RequestOutput, b: RequestOutput) -> bool:
    return [(o.token_ids, o.score) for o in a.outputs] == [
        (o.token_ids, o.score) for o in b.outputs
    ]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda inputs: 1 / 0, "raised ZeroDivisionError"),
        (lambda inputs: [1.0], "must return 4 scores, got 1"),
        (lambda inputs: [math.nan] * len(inputs), "must return finite scores, got nan"),
        (lambda inputs: None, "raised TypeError"),
    ],
)
def test_broken_scorers(engine: Engine, scorer, message: str) -> None:
    alone = engine.generate("hello", NEIGHBOUR)[0]
    broken = SearchParams.cbs(
        max_tokens=9, beam_width=2, num_candidates=2, chunk_length=3, scorer=scorer
    )
    error, neighbour = _run_beside(engine, broken)
    assert isinstance(error, ScorerError)
    assert message in str(error)
    assert "prompt 0 of 2 failed" in error.__notes__
    assert _same(neighbour, alone)


class _Poison(torch.nn.Module):
    """An LM head whose logits are NaN for hidden states of rows that hold a marked token."""

    def __init__(self, head: torch.nn.Module, state: dict) -> None:
        super().__init__()
        self.head, self.state = head, state

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        self.state["calls"] += 1
        if self.state["calls"] == self.state["raise_at"]:
            raise self.state["error"]
        if self.state["calls"] == self.state["nan_at"]:
            logits[..., 0, :] = math.nan
        return logits


@pytest.fixture
def poisoned(models) -> Iterator[tuple[Engine, dict]]:
    base = tiny_model("gpt2", seed=1)
    with Engine(
        base,
        tiny_tokenizer(),
        tuned=models["tuned"],
        untuned=models["untuned"],
        config=EngineConfig(num_blocks=80),
    ) as engine:
        state = {"calls": 0, "raise_at": -1, "nan_at": -1}
        state["error"] = RuntimeError("planted failure")
        base.lm_head = _Poison(base.lm_head, state)
        yield engine, state


@pytest.mark.parametrize("call", range(1, 9))
def test_nan_logits_fail_their_request_alone(poisoned, call: int) -> None:
    engine, state = poisoned
    alone = engine.generate("hello", NEIGHBOUR)[0]
    state.update(calls=0, nan_at=call)
    error, neighbour = _run_beside(engine, PARAMS)
    assert isinstance(error, NonFiniteLogitsError)
    assert f"response token {call - 1} of candidate 0" in str(error)
    assert _same(neighbour, alone)
    engine.check_integrity()
    assert engine.stats()["num_blocks_used"] == 0
    assert _same(engine.generate("hello", NEIGHBOUR)[0], alone)


def test_a_forward_that_raises_at_any_call(poisoned) -> None:
    engine, state = poisoned
    state.update(calls=0, raise_at=-1)
    alone = engine.generate("hello", NEIGHBOUR)[0]
    num_calls = state["calls"]
    assert num_calls > 10
    for call in range(1, num_calls + 1):
        state.update(calls=0, raise_at=call)
        with pytest.raises(RuntimeError, match="planted failure"):
            engine.generate("hello", NEIGHBOUR)
        engine.check_integrity()
        assert engine.stats()["num_blocks_used"] == 0
    state.update(calls=0, raise_at=-1)
    assert _same(engine.generate("hello", NEIGHBOUR)[0], alone)


def test_a_forward_that_raises_loses_no_finished_output(poisoned) -> None:
    engine, state = poisoned
    brief = SearchParams(max_tokens=2, ignore_eos=True)
    state.update(calls=0, raise_at=20)
    with pytest.raises(RuntimeError, match="planted failure") as caught:
        engine.generate(["a", "b"], [brief, SearchParams(max_tokens=40, ignore_eos=True)])
    assert len(caught.value.outputs[0].outputs[0].token_ids) == 2
    assert caught.value.outputs[1] is None


def test_an_interrupt_leaves_the_engine_whole(poisoned) -> None:
    engine, state = poisoned
    alone = engine.generate("hello", NEIGHBOUR)[0]
    for call in (1, 2, 6):
        state.update(calls=0, raise_at=call, error=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["hello", "you"], NEIGHBOUR)
        engine.check_integrity()
        assert engine.stats()["num_blocks_used"] == 0
        assert not engine.has_unfinished
    state.update(calls=0, raise_at=-1)
    assert _same(engine.generate("hello", NEIGHBOUR)[0], alone)


def test_generate_leaves_the_requests_of_others_to_step(engine: Engine) -> None:
    request = engine.add_request("a", PARAMS, seed=3)
    (output,) = engine.generate("a", PARAMS, seeds=[3])
    ended = dict(engine.step())
    assert list(ended) == [request]
    assert _same(ended[request], output)


def test_queue(models) -> None:
    config = EngineConfig(num_blocks=80, max_queued_requests=2)
    with Engine(tokenizer=tiny_tokenizer(), **models, config=config) as engine:
        engine.add_request("a", PARAMS)
        engine.add_request("b", PARAMS)
        with pytest.raises(QueueFullError, match="max_queued_requests is 2"):
            engine.add_request("c", PARAMS)
        # generate() feeds the queue as places come free; what others queued goes to step().
        outputs = engine.generate(["d", "e", "f", "g", "h"], PARAMS, seeds=[5] * 5)
        assert [output.prompt for output in outputs] == ["d", "e", "f", "g", "h"]
        ended = []
        while engine.has_unfinished:
            ended += engine.step()
        assert sorted(output.prompt for _, output in ended) == ["a", "b"]
        assert engine.stats()["num_blocks_used"] == 0


def test_abort_and_deadline(engine: Engine) -> None:
    request = engine.add_request("hello", NEIGHBOUR)
    engine.step()
    assert engine.abort(request)
    ((ended, output),) = engine.step()
    assert ended == request
    assert {o.finish_reason for o in output.outputs} == {"abort"}
    assert all(0 < len(o.token_ids) < NEIGHBOUR.max_tokens for o in output.outputs)
    assert not engine.abort(request)
    late = SearchParams(max_tokens=200, deadline_s=0.0)
    (output,) = engine.generate("hello", late)
    assert output.outputs[0].finish_reason == "deadline"


def test_models_that_do_not_fit_together(models) -> None:
    base = models["base_model"]
    with pytest.raises(InvalidParameterError, match=r"base must be a torch module; .* got 'gpt2'"):
        Engine("gpt2")
    with pytest.raises(InvalidParameterError, match="config must be an EngineConfig"):
        Engine(base, config={"num_blocks": 3})
    with pytest.raises(InvalidParameterError, match="untuned must be given too"):
        Engine(base, tuned=models["tuned"])
    with pytest.raises(UnsupportedModelError, match="value must be a ValueHeadModel"):
        Engine(base, value=models["tuned"])
    small = tiny_model("gpt2", vocab_size=60)
    with pytest.raises(VocabularyMismatchError, match="token id 60"):
        Engine(base, tiny_tokenizer(), tuned=small, untuned=small)
    assert base.config._attn_implementation != "ivg_paged", "a refused model is given back"


def test_value_scores_that_are_not_finite(models) -> None:
    head = torch.nn.Linear(32, 97, bias=False).requires_grad_(False)
    value = ValueHeadModel(tiny_model("gpt2", seed=4).transformer, head)
    params = SearchParams.cbs(
        max_tokens=9, beam_width=2, num_candidates=2, chunk_length=3, scorer="explicit"
    )
    with Engine(models["base_model"], value=value, config=EngineConfig(num_blocks=80)) as engine:
        head.weight.fill_(math.inf)  # the check at load would have refused it
        with pytest.raises(ScorerError, match="must give finite scores"):
            engine.generate([[1, 2]], params)
