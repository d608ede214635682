# SPDX-License-Identifier: Apache-2.0
"""Engines that are closed, share modules, are interrupted, or called by their own scorers."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import Engine, EngineConfig, IVGError, ScorerError, SearchParams

CONFIG = EngineConfig(num_blocks=80)
PARAMS = SearchParams(max_tokens=9, seed=3)


def chunked(scorer, **options) -> SearchParams:
    fields = {"max_tokens": 9, "beam_width": 2, "num_candidates": 2, "chunk_length": 3, "seed": 5}
    return SearchParams.cbs(scorer=scorer, **{**fields, **options})


def zeros(inputs) -> list[float]:
    return [0.0] * len(inputs)


@pytest.fixture
def engine():
    with Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=CONFIG) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats()["num_blocks_used"] == 0
        assert not engine.has_unfinished


def test_a_closed_engine_refuses_and_holds_no_pools() -> None:
    engine = Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=CONFIG)
    engine.generate("abc", PARAMS)
    queued = engine.add_request("abc", PARAMS)
    pools = [weakref.ref(pool) for runner in engine._runners.values() for pool in runner.pools]
    assert all(pool() is not None for pool in pools)
    engine.close()
    engine.close()
    gc.collect()
    assert all(pool() is None for pool in pools)
    for call in (
        lambda: engine.generate("abc", PARAMS),
        lambda: engine.add_request("abc", PARAMS),
        engine.step,
        engine.warmup,
        engine.use_scorer_threads,
        engine.__enter__,
    ):
        with pytest.raises(IVGError, match="the engine is closed"):
            call()
    assert not engine.has_unfinished  # a loop over it ends
    assert not engine.has_room
    assert not engine.can_serve(PARAMS)
    assert not engine.abort(queued)


@pytest.mark.parametrize("is_last_first", [True, False])
def test_engines_that_share_a_module(is_last_first: bool) -> None:
    """Whichever closes last gives back what was there before either."""
    model = tiny_model("gpt2", seed=1, pad_token_id=2)
    stock = model.config._attn_implementation
    assert stock != "eager"
    engines = [Engine(model, tiny_tokenizer(), config=CONFIG) for _ in range(2)]
    closing = engines[::-1] if is_last_first else engines
    (expected,) = closing[0].generate("abc", PARAMS)
    closing[0].close()
    assert closing[1].generate("abc", PARAMS)[0].outputs == expected.outputs
    closing[1].close()
    assert model.config._attn_implementation == stock
    assert model.config.pad_token_id == 2


def test_roles_that_share_a_module_give_its_attention_back() -> None:
    model = tiny_model("gpt2", seed=1)
    stock = model.config._attn_implementation
    Engine(model, tuned=model, untuned=model, config=CONFIG).close()
    assert model.config._attn_implementation == stock


def test_a_scorer_cannot_run_its_own_engine(engine: Engine) -> None:
    def asks(inputs):
        return [len(engine.generate(i.response, PARAMS)) for i in inputs]

    with pytest.raises(ScorerError, match="cannot run or close the engine that waits") as e:
        engine.generate(["abc", "abc", "abc"], [chunked(asks), PARAMS, chunked(zeros)])
    assert e.value.outputs[0] is None
    assert all(output is not None for output in e.value.outputs[1:])


@pytest.mark.parametrize("is_late", [True, False])
def test_a_scorer_cannot_close_its_own_engine(is_late: bool) -> None:
    config = EngineConfig(num_blocks=80, scorer_timeout_s=60 if is_late else None)
    with Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=config) as engine:

        def closes(inputs):
            engine.close()
            return zeros(inputs)

        with pytest.raises(ScorerError, match="cannot run or close the engine that waits"):
            engine.generate("abc", chunked(closes))
        assert engine.generate("abc", PARAMS)


def test_a_second_thread_is_refused(engine: Engine) -> None:
    """While one thread runs the engine, another neither runs nor closes it; afterwards it may."""
    refused = []

    def asks_elsewhere(inputs):
        def intrude() -> None:
            for call in (lambda: engine.generate("abc", PARAMS), engine.step, engine.close):
                with pytest.raises(IVGError, match="another thread runs this engine") as error:
                    call()
                refused.append(error.value)

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return zeros(inputs)

    (output,) = engine.generate("abc", chunked(asks_elsewhere))
    assert len(refused) >= 3
    outputs = []
    thread = threading.Thread(target=lambda: outputs.extend(engine.generate("abc", chunked(zeros))))
    thread.start()
    thread.join()
    assert outputs[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_a_scorer_may_abort_requests(engine: Engine) -> None:
    ids: list[int] = []

    def aborts(inputs):
        engine.abort(ids[1])
        return zeros(inputs)

    ids += [engine.add_request("abc", chunked(scorer)) for scorer in (aborts, zeros)]
    ended = {}
    while engine.has_unfinished:
        ended.update(engine.step())
    reasons = [ended[i].outputs[0].finish_reason for i in ids]
    assert reasons[1] == "abort"
    assert reasons[0] in ("length", "stop")


def test_has_unfinished_until_everything_is_returned(engine: Engine) -> None:
    request = engine.add_request("abc", PARAMS)
    engine.abort(request)
    assert engine.has_unfinished
    assert [ended for ended, _ in engine.step()] == [request]
    assert not engine.has_unfinished


def test_an_interrupted_generate_leaves_nothing_for_step(engine: Engine) -> None:
    def interrupts(inputs):
        raise KeyboardInterrupt

    other = engine.add_request("abc", SearchParams(max_tokens=40, seed=3))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["abc", "abc"], chunked(interrupts))
    ended = []
    while engine.has_unfinished:
        ended += [request for request, _ in engine.step()]
    assert ended == [other]


def test_a_text_that_cannot_be_decoded_fails_its_request_alone(engine: Engine, monkeypatch) -> None:
    decode = engine.tokenizer.decode

    def fails_on_short(tokens, **options):
        if len(tokens) == 2:
            raise UnicodeError("planted failure")
        return decode(tokens, **options)

    monkeypatch.setattr(engine.tokenizer, "decode", fails_on_short)
    short = SearchParams(max_tokens=2, ignore_eos=True)
    ids = [engine.add_request([1, 2], params) for params in (PARAMS, short, PARAMS)]
    ended = {}
    while engine.has_unfinished:
        ended.update(engine.step())
    assert isinstance(ended[ids[1]], UnicodeError)
    assert all(ended[i].outputs[0].text for i in (ids[0], ids[2]))


def test_ends_of_text_past_the_shared_ids() -> None:
    """The base has 104 ids and ends its texts by two, of which its guides know one."""
    base = tiny_model("llama", vocab_size=104)
    base.generation_config.eos_token_id = [103, 96]
    guides = {role: tiny_model("gpt2", seed=i) for i, role in enumerate(("tuned", "untuned"), 2)}
    params = chunked("implicit", min_tokens=5, score_eos_on_truncation=True)
    with Engine(base, **guides, config=CONFIG) as engine:
        (output,) = engine.generate([[1, 2]], params)
    assert len(output.outputs[0].token_ids) >= 5
    base.generation_config.eos_token_id = [103]
    with pytest.raises(IVGError, match=r"token ids \[103\], which end a text"):
        Engine(base, **guides, config=CONFIG)


@pytest.mark.parametrize("option", ["stop", "score_eos_on_truncation"])
def test_scoring_an_end_of_text_that_no_model_has(option: str) -> None:
    models = [tiny_model("gpt2", seed=i, eos_token_id=None) for i in range(3)]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with Engine(models[0], tokenizer, tuned=models[1], untuned=models[2], config=CONFIG) as engine:
        value = "a" if option == "stop" else True
        with pytest.raises(IVGError, match=f"{option} with scorer 'implicit' needs a model with"):
            engine.generate("abc", chunked("implicit", **{option: value}))
        assert engine.generate("abc", chunked(zeros, **{option: value}))


def test_prompts_in_every_form(engine: Engine) -> None:
    ids = [65, 66]
    (wanted,) = engine.generate([ids], PARAMS)
    tensor = torch.tensor(ids)
    for form in (ids, tuple(ids), tensor, tensor.numpy(), [tensor], tensor[None], [tensor.numpy()]):
        (output,) = engine.generate(form, PARAMS)
        assert output.outputs == wanted.outputs
    assert engine.generate("ab", PARAMS)[0].outputs == wanted.outputs
    assert engine.generate([], PARAMS) == []
    engine.add_request(tensor, PARAMS)
    assert engine.step()[0][1].outputs == wanted.outputs


def test_num_threads_of_a_step() -> None:
    seen = []

    def spy(inputs):
        seen.append(torch.get_num_threads())
        return [0.0] * len(inputs)

    before = torch.get_num_threads()
    params = SearchParams.best_of_n(2, max_tokens=3, scorer=spy)
    for num_threads in (None, 2):
        config = EngineConfig(num_blocks=20, num_threads=num_threads)
        with Engine(tiny_model("gpt2"), tiny_tokenizer(), config=config) as engine:
            engine.generate("hello", params)
    assert seen == [before, 2]
    assert torch.get_num_threads() == before


def test_no_forward_looks_for_padding() -> None:
    """A packed token with the pad's id is a token; the model gets its configuration back."""
    model = tiny_model("gpt2", pad_token_id=3)
    with Engine(model, config=EngineConfig(num_blocks=20)) as engine:
        assert model.config.pad_token_id is None
        engine.generate([[3, 1, 3]], SearchParams(max_tokens=2))
    assert model.config.pad_token_id == 3


def test_warmup_leaves_nothing_behind() -> None:
    roles = {role: tiny_model("gpt2", seed=i) for i, role in enumerate(("tuned", "untuned"), 2)}
    params = [chunked("implicit"), SearchParams.eft(max_tokens=4, seed=1), PARAMS]
    outputs = []
    for is_warm in (False, True):
        with Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), **roles, config=CONFIG) as engine:
            waiting = engine.add_request("abc", PARAMS)
            before = engine.stats()
            if is_warm:
                engine.warmup()
                engine.check_integrity()
                # It runs along, and its output is there for step().
                assert engine.has_unfinished
                assert [i for i, _ in engine.step()] == [waiting]
            else:
                while engine.has_unfinished:
                    engine.step()
            outputs.append(engine.generate(["abc"] * 3, params))
            idle = {**before, "num_requests_waiting": 0}
            assert engine.stats() == idle
    assert outputs[0] == outputs[1]


def test_warmup_runs_every_kind_that_there_is(monkeypatch) -> None:
    seen = []
    generate = Engine.generate

    def spy(self, prompts, params):
        seen.extend(params if isinstance(params, list) else [params])
        return generate(self, prompts, params)

    monkeypatch.setattr(Engine, "generate", spy)
    roles = {role: tiny_model("gpt2", seed=i) for i, role in enumerate(("tuned", "untuned"), 2)}
    with Engine(tiny_model("gpt2", seed=1), **roles, config=CONFIG) as engine:
        engine.warmup()
    kinds = ("none", "implicit")
    assert {(p.guidance, p.scorer) for p in seen} == {(a, b) for a in kinds for b in kinds}
    assert {p.pool_size for p in seen} == {1, 4}


@pytest.mark.parametrize("config", [{"num_blocks": 2}, {"max_num_rows": 1, "num_blocks": 4}])
def test_warmup_of_a_small_engine(config) -> None:
    with Engine(tiny_model("gpt2", seed=1), config=EngineConfig(**config)) as engine:
        engine.warmup()
        assert engine.stats()["num_blocks_used"] == 0
        engine.close()
        with pytest.raises(IVGError, match="the engine is closed"):
            engine.warmup()
