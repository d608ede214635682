# SPDX-License-Identifier: Apache-2.0
"""generate(custom_generate=...): equal to the engine, and with weight 0 to stock generate."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from engine_cases import fresh_seed
from generate_cases import EOS, SHAPES, expected, family, guides, padded, prompts_of, tokenizer
from tiny_models import tiny_model
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria

from ivg_fast import Engine, EngineConfig, InvalidParameterError, Prompt, ScoreInput, SearchParams
from ivg_fast.integrations._engines import MAX_ENGINES, shelf_of
from ivg_fast.integrations.transformers import close_engines, generate

SEED = fresh_seed()
CONFIG = EngineConfig(num_blocks=300)
LENGTHS = (5, 11, 1, 17)


def run(models: dict[str, Any], inputs: dict[str, Any], search: Any, **kwargs: Any) -> Any:
    kwargs = {"engine_config": CONFIG, "custom_generate": generate, "search": search, **kwargs}
    return models["base"].generate(**inputs, **kwargs)


@pytest.fixture(autouse=True)
def _no_engine_left():
    yield
    close_engines()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [(9,), LENGTHS])
def test_weight_zero_and_greedy_is_stock_generate(shape: str, length: tuple[int, ...]) -> None:
    models = family(shape, SEED)
    inputs = padded(prompts_of(SEED, length))
    stock = models["base"].generate(**inputs, max_new_tokens=14, do_sample=False)
    eft = SearchParams.eft(max_tokens=14, guidance_weight=0.0)
    ours = run(models, inputs, eft, max_new_tokens=14, **guides(models))
    assert torch.equal(ours, stock)
    again = models["base"].generate(**inputs, max_new_tokens=14, do_sample=False)
    assert torch.equal(again, stock), "the model is not what it was"
    tilted = SearchParams.eft(max_tokens=14, guidance_weight=1.0)
    other = run(models, inputs, tilted, max_new_tokens=14, **guides(models))
    assert other.shape[0] == stock.shape[0]
    assert not torch.equal(other[:, : stock.shape[1]], stock), "the control: guidance does nothing"


SEARCHES = {
    "eft": (SearchParams.eft(max_tokens=9, guidance_weight=0.7), ("tuned", "untuned"), 1),
    "ivg": (
        SearchParams.ivg(max_tokens=9, beam_width=2, num_candidates=2, chunk_length=3),
        ("tuned", "untuned", "value"),
        2,
    ),
    "cbs": (
        SearchParams.cbs(max_tokens=9, beam_width=2, num_candidates=2, chunk_length=4),
        ("tuned", "untuned"),
        1,
    ),
    "samples": (SearchParams(max_tokens=9), (), 3),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("shape", ["gpt2", "mistral"])
def test_equal_to_the_engine(shape: str, name: str) -> None:
    models = family(shape, SEED)
    search, roles, count = SEARCHES[name]
    prompts = prompts_of(SEED + 1, LENGTHS)
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    own = {"num_candidates": count} if name == "samples" else {}
    search = replace(search, seed=SEED)
    with Engine(models["base"], config=CONFIG, **guides(models, *roles) if roles else {}) as engine:
        outputs = engine.generate(prompts, replace(search, n=count, **sampling, **own))
    inputs = padded(prompts)
    result = run(
        models,
        inputs,
        search,
        max_new_tokens=9,
        do_sample=True,
        num_return_sequences=count,
        return_dict_in_generate=True,
        **sampling,
        **(guides(models, *roles) if roles else {}),
    )
    assert isinstance(result, GenerateDecoderOnlyOutput)
    responses = [
        output.outputs[i % len(output.outputs)].token_ids
        for output in outputs
        for i in range(count)
    ]
    assert torch.equal(result.sequences, expected(inputs, responses))
    assert [[c.score for c in r.outputs] for r in result.requests] == [
        [c.score for c in r.outputs] for r in outputs
    ]


def test_a_seed_of_torch_repeats_a_call() -> None:
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (4, 6)))
    options = {"max_new_tokens": 12, "do_sample": True, **guides(models)}
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run(models, inputs, SearchParams.eft(max_tokens=12), **options))
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


def test_ends_of_text_are_those_of_generate() -> None:
    """Those of the generation config, of the call, and none; with min_new_tokens."""
    models, inputs = family("llama", SEED), padded(prompts_of(SEED, (7, 3)))
    free = models["base"].generate(**inputs, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    ends = free[0, inputs["input_ids"].shape[1] + 3].item()
    search = SearchParams.eft(max_tokens=12, guidance_weight=0.0)
    for said in (
        {"eos_token_id": ends},
        {"eos_token_id": [EOS, ends]},
        {"eos_token_id": None},
        {"eos_token_id": ends, "min_new_tokens": 7},
        {"eos_token_id": ends, "min_length": inputs["input_ids"].shape[1] + 7},
    ):
        options = {"max_new_tokens": 12, "pad_token_id": 0, **said}
        stock = models["base"].generate(**inputs, **options)
        ours = run(models, inputs, search, **options, **guides(models))
        assert torch.equal(ours, stock), said
        config = {"generation_config": GenerationConfig(**options)}
        stock = models["base"].generate(**inputs, **config)
        assert torch.equal(run(models, inputs, search, **config, **guides(models)), stock), said


REFUSED = {
    "num_beams": {"num_beams": 2},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[4]]},
    "suppress_tokens": {"suppress_tokens": [4]},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "typical_p": {"typical_p": 0.5, "do_sample": True},
    "epsilon_cutoff": {"epsilon_cutoff": 0.1, "do_sample": True},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda _i, _ids: [1, 2]},
    "logits_processor": {"logits_processor": LogitsProcessorList([lambda _ids, s: s])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([lambda _ids, _s: False])},
    "search.max_tokens": {"search": SearchParams(max_tokens=7)},
    "search.temperature": {"search": SearchParams(max_tokens=8, temperature=0.7)},
    "search.top_k": {
        "search": SearchParams(max_tokens=8, top_k=3),
        "do_sample": True,
    },
    "search.n": {
        "search": SearchParams(max_tokens=8, num_candidates=4, n=3),
        "do_sample": True,
        "num_return_sequences": 2,
    },
    "num_return_sequences": {
        "search": SearchParams.best_of_n(2, max_tokens=8),
        "do_sample": True,
        "num_return_sequences": 3,
    },
    "do_sample": {"search": SearchParams.best_of_n(2, max_tokens=8)},
    "search": {"search": None},
    "token_streamer": {"token_streamer": 3},
    "role_inputs": {"role_inputs": {"base": {}}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (4, 4)))
    options = {"max_new_tokens": 8, "search": SearchParams(max_tokens=8), **REFUSED[name]}
    with pytest.raises(InvalidParameterError) as caught:
        run(models, inputs, **{"search": None, **options}, **guides(models))
    assert caught.value.parameter == name


def test_padding_that_cannot_be() -> None:
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (4, 6)))
    search = SearchParams(max_tokens=3)
    wrong = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(InvalidParameterError, match="attention_mask must pad on the left"):
        run(models, wrong, search, max_new_tokens=3)
    positions = torch.arange(6).repeat(2, 1)
    with pytest.raises(InvalidParameterError, match="position_ids"):
        run(models, {**inputs, "position_ids": positions}, search, max_new_tokens=3)
    embeds = {"inputs_embeds": torch.zeros(1, 3, 32)}
    with pytest.raises(InvalidParameterError):
        run(models, embeds, search, max_new_tokens=3)
    with pytest.raises(InvalidParameterError, match="pad_token_id"):
        run(
            {"base": tiny_model("llama", seed=3, eos_token_id=None)},
            padded(prompts_of(SEED, (4, 4))),
            SearchParams(max_tokens=3, stop_token_ids=(5,)),
            max_new_tokens=3,
            eos_token_id=None,
        )


def test_models_in_training_mode_are_refused() -> None:
    models = family("gpt2", SEED)
    tuned = copy.deepcopy(models["tuned"]).train()
    with pytest.raises(InvalidParameterError, match=r"tuned\.training"):
        run(
            models,
            padded(prompts_of(SEED, (4,))),
            SearchParams.eft(max_tokens=2),
            max_new_tokens=2,
            tuned=tuned,
            untuned=models["untuned"],
        )


def test_the_streamer_gets_every_decided_token() -> None:
    models, prompts = family("gpt2", SEED), prompts_of(SEED, LENGTHS)
    inputs = padded(prompts)
    for search in (
        SearchParams.eft(max_tokens=20, seed=5),
        SearchParams.ivg(max_tokens=20, beam_width=1, num_candidates=3, chunk_length=4, seed=5),
    ):
        options = {"max_new_tokens": 20, "do_sample": True}
        options |= guides(models, "tuned", "untuned", "value")
        said: list[list[list[int]]] = [[] for _ in prompts]
        ours = run(
            models,
            inputs,
            search,
            token_streamer=lambda i, tokens, said=said: said[i].append(tokens),
            **options,
        )
        assert torch.equal(ours, run(models, inputs, search, **options))
        assert torch.equal(ours, expected(inputs, [list(chain(*tokens)) for tokens in said]))
        assert max(map(len, said)) > 2, "all came at the end"


def test_a_streamer_of_transformers() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.puts: list[list[int]] = []
            self.has_ended = False

        def put(self, value: torch.Tensor) -> None:
            self.puts.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.has_ended = True

    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (6,)))
    search = SearchParams.eft(max_tokens=15)
    streamer = Streamer()
    options = {"max_new_tokens": 15, **guides(models)}
    ours = run(models, inputs, search, token_streamer=streamer, **options)
    assert streamer.has_ended
    assert streamer.puts[0] == inputs["input_ids"][0].tolist()
    assert list(chain(*streamer.puts)) == ours[0].tolist()
    with pytest.raises(InvalidParameterError, match="token_streamer"):
        run(models, padded(prompts_of(SEED, (2, 2))), search, token_streamer=Streamer(), **options)


def test_a_streamer_that_fails_leaves_a_clean_engine() -> None:
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (6, 3)))
    options = {"max_new_tokens": 15, **guides(models)}
    search = SearchParams.eft(max_tokens=15)

    def fail(_index: int, _tokens: list[int]) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run(models, inputs, search, token_streamer=fail, **options)
    shelf = shelf_of(models["base"])
    ((engine, _),) = shelf._engines.values()
    engine.check_integrity()
    assert not engine.has_unfinished
    first = run(models, inputs, search, **options)
    close_engines(models["base"])
    assert torch.equal(run(models, inputs, search, **options), first)


def test_engines_are_kept_and_closed() -> None:
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (6,)))
    search = SearchParams.eft(max_tokens=3)

    def engines() -> list[Engine]:
        return [engine for engine, _ in shelf_of(models["base"])._engines.values()]

    run(models, inputs, search, max_new_tokens=3, **guides(models))
    (first,) = engines()
    run(models, inputs, search, max_new_tokens=3, **guides(models))
    assert engines() == [first]
    plain = SearchParams(max_tokens=3)
    run(models, inputs, plain, max_new_tokens=3)
    assert len(engines()) == 2
    for blocks in range(20, 20 + MAX_ENGINES):
        config = EngineConfig(num_blocks=blocks)
        run(models, inputs, plain, max_new_tokens=3, engine_config=config)
    assert len(engines()) == MAX_ENGINES
    assert first not in engines()
    with pytest.raises(Exception, match="closed"):
        first.generate([[1, 2]], plain)
    close_engines(models["base"])
    assert engines() == []


def test_weights_may_change_between_calls() -> None:
    """Stock generate is the oracle after each change: in place, by .data, and of the size."""
    base = tiny_model("gpt2", seed=SEED, eos_token_id=EOS)
    models, inputs = {"base": base}, padded(prompts_of(SEED, (6, 2)))
    base.generation_config.update(eos_token_id=EOS, pad_token_id=0)
    search = SearchParams(max_tokens=10)

    def change(step: int) -> None:
        weight = base.transformer.h[0].mlp.c_fc.weight
        with torch.no_grad():
            if step == 1:
                weight.add_(torch.randn_like(weight))
            elif step == 2:
                weight.data += torch.randn_like(weight)
            elif step == 3:
                base.resize_token_embeddings(60, mean_resizing=False)

    inputs["input_ids"] %= 60
    seen = []
    for step in range(4):
        change(step)
        stock = base.generate(**inputs, max_new_tokens=10)
        assert torch.equal(run(models, inputs, search, max_new_tokens=10), stock)
        seen.append(stock.tolist())
    assert seen[0] != seen[1] != seen[2], "the control: the changes change nothing"


def test_models_go_when_nobody_holds_them() -> None:
    base, tuned, untuned = (tiny_model("gpt2", seed=i) for i in range(3))
    inputs = padded(prompts_of(SEED, (6,)))
    run(
        {"base": base},
        inputs,
        SearchParams.eft(max_tokens=2),
        max_new_tokens=2,
        tuned=tuned,
        untuned=untuned,
    )
    refs = [weakref.ref(model) for model in (base, tuned, untuned)]
    refs.append(weakref.ref(next(iter(shelf_of(base)._engines.values()))[0]))
    del base, tuned, untuned
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_copies_and_pickles_come_without_engines() -> None:
    base = tiny_model("gpt2", seed=SEED)
    inputs = padded(prompts_of(SEED, (6,)))
    search = SearchParams(max_tokens=4)
    ours = run({"base": base}, inputs, search, max_new_tokens=4, eos_token_id=None)
    file = io.BytesIO()
    torch.save(base, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(base),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(base)),
    ):
        assert len(shelf_of(twin)) == 0
        assert torch.equal(
            run({"base": twin}, inputs, search, max_new_tokens=4, eos_token_id=None), ours
        )
    assert len(shelf_of(base)) == 1


def test_prompts_by_role_stops_and_scorers() -> None:
    models, prompts = family("gpt2", SEED), prompts_of(SEED, (6, 3))
    other = prompts_of(SEED + 9, (2, 8))
    calls: list[int] = []

    def scorer(inputs: list[ScoreInput]) -> list[float]:
        calls.append(len(inputs))
        return [float(len(set(item.response))) for item in inputs]

    search = SearchParams.ivg(
        max_tokens=12, beam_width=2, num_candidates=2, chunk_length=3, scorer=scorer, seed=3,
        stop=("e", "th"),
    )  # fmt: skip
    asked = [Prompt(raw=a, tuned=b, untuned=b) for a, b in zip(prompts, other, strict=True)]
    with Engine(models["base"], tokenizer(), config=CONFIG, **guides(models)) as engine:
        own = replace(search, ignore_eos=True, stop_token_ids=(EOS,))
        outputs = engine.generate(asked, own)
    inputs = padded(prompts)
    ours = run(
        models,
        inputs,
        search,
        text_tokenizer=tokenizer(),
        role_inputs={"tuned": padded(other), "untuned": padded(other)},
        max_new_tokens=12,
        do_sample=True,
        top_k=0,
        **guides(models),
    )
    assert torch.equal(ours, expected(inputs, [o.outputs[0].token_ids for o in outputs]))
    assert calls


def test_a_length_criterion_of_ones_own_is_known() -> None:
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (4,)))
    criteria = StoppingCriteriaList([MaxLengthCriteria(12)])
    search = SearchParams.eft(max_tokens=8, guidance_weight=0.0)
    ours = run(
        models, inputs, search, max_new_tokens=8, stopping_criteria=criteria, **guides(models)
    )
    assert torch.equal(ours, models["base"].generate(**inputs, max_new_tokens=8))
