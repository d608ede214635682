# SPDX-License-Identifier: Apache-2.0
"""Random requests for the engine, and the comparison of what it returns with the naive search.

The engine installs its own attention in the modules that it is given, so the oracle has models of
its own, made from the same seeds.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from naive_search import NaiveModels, NaiveOutput, NaiveResult, NaiveSearch
from tiny_models import attention_of, redraw_weights, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from ivg_fast.engine import Engine
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.models.value_head import ScalarHeadModel, ValueHeadModel, ValueModel
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, ScoreInput, SearchParams

SHAPES = ("gpt2", "llama", "mistral", "qwen3", "gemma2")
GUIDANCE = ("none", "implicit", "explicit")
SCORERS = ("none", "implicit", "explicit", "callable")
CELLS = [(guidance, scorer) for guidance in GUIDANCE for scorer in SCORERS]
NEAR_TIE = 1e-5

CLASSIFIERS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
# Kinds of explicit values; one on the trunk has the backbone of `tuned`.
VALUES = ("vocabulary", "scalar", *CLASSIFIERS, "trunk", "scalar trunk", "text", "scalar text")
TEXT_VOCAB_SIZE = 95 + 28 * 28 + 2

# The guides have another shape than the base, so that no role can stand in for another.
_PAIR_SHAPE = {"gpt2": "llama", "llama": "gpt2", "mistral": "llama", "qwen3": "mistral"}
_VALUE_SHAPE = {"gpt2": "gpt2", "llama": "mistral", "mistral": "gpt2", "gemma2": "gemma2"}


def fresh_seed() -> int:
    """A seed of this run; tests carry it in their ids, which side by side must be the same."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return (random.Random(run) if run else random.SystemRandom()).randrange(10**6)


def value_model(
    shape: str,
    *,
    vocab_size: int,
    seed: int,
    backbone: Any = None,
    is_scalar: bool = False,
    **overrides: Any,
) -> ValueModel:
    """A vocabulary or scalar head on a backbone of `shape`, or on the one that is given."""
    if backbone is None:
        config = tiny_config(shape, vocab_size, **overrides)
        backbone = AutoModel.from_config(config, attn_implementation=attention_of(shape))
        redraw_weights(backbone, seed)
    head = torch.nn.Linear(backbone.config.hidden_size, 1 if is_scalar else vocab_size, bias=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(head.weight.shape, generator=generator))
    kind = ScalarHeadModel if is_scalar else ValueHeadModel
    return kind(backbone, head).eval().requires_grad_(False)


def classifier(shape: str, kind: str, *, vocab_size: int, seed: int, **overrides: Any) -> Any:
    """A sequence or token classification model of transformers with one label."""
    config = tiny_config(shape, vocab_size, num_labels=1, **overrides)
    model = CLASSIFIERS[kind].from_config(config, attn_implementation=attention_of(shape))
    redraw_weights(model, seed)
    return model.eval().requires_grad_(False)


def pair_tokenizer() -> Any:
    """Another tokenizer than the families' own: it merges pairs of their pieces, so that a text's
    last tokens change as it grows, and it puts a beginning of text in front."""
    pieces = [chr(code) for code in range(32, 127)]
    alphabet = pieces[:28]
    merges = [(a, b) for a in alphabet for b in alphabet]
    random.Random(7).shuffle(merges)
    pieces += [a + b for a, b in merges] + ["<s>", "</s>"]
    assert len(pieces) == TEXT_VOCAB_SIZE
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.decoder = decoders.Fuse()
    bos = ("<s>", vocab["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def tokenizer_with_eos(vocab_size: int, eos_token_id: int) -> Any:
    """tiny_tokenizer, but the piece `eos_token_id` ends the text."""
    tokenizer = tiny_tokenizer(vocab_size)
    if tokenizer.eos_token_id != eos_token_id:
        piece = tokenizer.convert_ids_to_tokens(eos_token_id)
        tokenizer.add_special_tokens({"eos_token": piece})
    assert (len(tokenizer), tokenizer.eos_token_id) == (vocab_size, eos_token_id)
    return tokenizer


@dataclass(slots=True)
class NaiveTextValue:
    """A value model with a tokenizer of its own: each text from its first token, by itself."""

    model: Any
    tokenizer: Any

    def __call__(self, inputs: list[ScoreInput]) -> list[float]:
        models = NaiveModels(base=None, tokenizer=None, value=self.model)
        scores = []
        for item in inputs:
            ids = self.tokenizer(item.prompt + item.response).input_ids
            if item.ends_text:
                ids.append(self.tokenizer.eos_token_id)
            scores.append(models.value_of(tuple(ids)))
        return scores


@dataclass(slots=True)
class Family:
    """A base model's shape with its guides; `roles()` makes new modules with equal weights."""

    shape: str
    seed: int
    vocab_size: int = 29
    eos_token_id: int = 28
    overrides: dict[str, Any] | None = None
    value: str = "vocabulary"  # one of VALUES

    def roles(self) -> dict[str, torch.nn.Module]:
        options = {
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            **(self.overrides or {}),
        }
        pair = _PAIR_SHAPE.get(self.shape, self.shape)
        value = _VALUE_SHAPE.get(self.shape, self.shape)
        roles = {
            "base": tiny_model(self.shape, seed=self.seed, **options),
            "tuned": tiny_model(pair, seed=self.seed + 1, **options),
            "untuned": tiny_model(pair, seed=self.seed + 2, **options),
        }
        if "text" in self.value:
            options.update(vocab_size=TEXT_VOCAB_SIZE, eos_token_id=TEXT_VOCAB_SIZE - 1)
        return {**roles, "value": self._value(value, roles["tuned"], options)}

    def _value(self, shape: str, tuned: Any, options: dict[str, Any]) -> torch.nn.Module:
        seed = self.seed + 3
        if self.value in CLASSIFIERS:
            return classifier(shape, self.value, seed=seed, **options)
        backbone = tuned.base_model if "trunk" in self.value else None
        is_scalar = "scalar" in self.value
        return value_model(shape, seed=seed, backbone=backbone, is_scalar=is_scalar, **options)

    def tokenizer(self) -> Any:
        return tokenizer_with_eos(self.vocab_size, self.eos_token_id)

    def naive(self) -> NaiveModels:
        roles: dict[str, Any] = self.roles()
        if "text" in self.value:
            roles["value"] = NaiveTextValue(roles["value"], pair_tokenizer())
        return NaiveModels(tokenizer=self.tokenizer(), **roles)

    def engine(
        self,
        tokenizers: dict[str, Any] | None = None,
        templates: Any = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        **config: Any,
    ) -> Engine:
        """`tokenizers` by role, the base's among them; by default one for all."""
        own = {"base": self.tokenizer(), **(tokenizers or {})}
        roles: dict[str, Any] = {r: m.to(device, dtype) for r, m in self.roles().items()}
        if "text" in self.value:
            roles["value"] = TextValueModel(roles["value"], pair_tokenizer())
        options = {"num_blocks": 2000, "num_threads": 1, **config}
        return Engine(
            roles.pop("base"),
            own.pop("base"),
            **roles,
            tokenizers=own,
            templates=templates,
            config=EngineConfig(**options),
        )


@dataclass(slots=True)
class Case:
    """A request. `params` is complete but for the seed, which goes to `generate` apart.

    Attributes:
        prompt: the base's token ids; what the other roles read, but for those in `of_role`.
        given: what the engine is given to make them of; None: the token ids themselves.
    """

    prompt: list[int]
    params: SearchParams
    seed: int
    of_role: dict[str, list[int]] = field(default_factory=dict)
    given: Any = None

    def solve(self, models: NaiveModels, search: type[NaiveSearch] = NaiveSearch) -> NaiveResult:
        return search(models, {"base": self.prompt, **self.of_role}, self.params, self.seed).run()

    @property
    def input(self) -> Any:
        """The prompt for the engine."""
        return self.prompt if self.given is None else self.given


def text_score(inputs: list[ScoreInput]) -> list[float]:
    """A callable in exact binary fractions of all it is given: equal texts tie, few others do."""
    scores = []
    for item in inputs:
        letters = sum((i + 3) * ord(c) for i, c in enumerate(item.response)) % 509
        tokens = sum((i + 5) * t for i, t in enumerate(item.token_ids)) % 127
        prompt = sum(map(ord, item.prompt)) % 31
        scores.append(letters / 8 + tokens / 512 + prompt / 4 + 2.0 * item.is_finished)
    return scores


def random_prompt(rng: random.Random, family: Family, longest: int = 40) -> list[int]:
    allowed = [t for t in range(family.vocab_size) if t != family.eos_token_id]
    return rng.choices(allowed, k=rng.randint(1, longest))


def random_case(
    rng: random.Random, family: Family, guidance: str, scorer: str, **fixed: Any
) -> Case:
    """A request of one cell of the grid; `fixed` overrides fields of SearchParams."""
    options: dict[str, Any] = {
        # Some responses go past their first KV block, and their forks with them.
        "max_tokens": rng.randint(17, 40) if rng.random() < 0.2 else rng.randint(3, 13),
        "beam_width": rng.randint(1, 3),
        "num_candidates": rng.randint(1, 3),
        "chunk_length": rng.choice([None, 1, 2, 3, 5]),
        "guidance": guidance,
        "guidance_weight": rng.choice([1.0, 0.5, -0.7, rng.uniform(0.1, 1.5)]),
        "scorer": text_score if scorer == "callable" else scorer,
        "temperature": rng.choice([1.0, 0.7, rng.uniform(0.5, 1.5)]),
        "top_k": rng.choice([0, 0, rng.randint(2, 20)]),
        "top_p": rng.choice([1.0, 1.0, rng.uniform(0.5, 0.99)]),
        "min_p": rng.choice([0.0, 0.0, rng.uniform(0.001, 0.2)]),
        "ignore_eos": rng.random() < 0.2,
        "dedup_finished": rng.random() < 0.4,
        "score_eos_on_truncation": rng.random() < 0.4,
        "logprobs": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        options["stop_token_ids"] = rng.sample(range(family.vocab_size), 2)
    options.update(fixed)
    if rng.random() < 0.3:
        options.setdefault("min_tokens", rng.randint(1, options["max_tokens"]))
    pool_size = options["beam_width"] * options["num_candidates"]
    if scorer == "none" and pool_size > 1:
        options["chunk_length"] = None
    params = SearchParams(n=pool_size, **options)
    return Case(random_prompt(rng, family), params, rng.randrange(2**64))


def with_stop_string(rng: random.Random, case: Case, models: NaiveModels) -> Case:
    """The case with a stop string that one of its candidates says on its way."""
    said = rng.choice(case.solve(models).outputs).text
    if not said:
        return case
    start = rng.randrange(len(said))
    stop = said[start : start + rng.choice([1, 2, 2, 3])]
    return replace(case, params=replace(case.params, stop=(stop,)))


def random_cases(
    rng: random.Random,
    family: Family,
    models: NaiveModels,
    *,
    cells: Sequence[tuple[str, str]] = CELLS,
    chunk_lengths: Sequence[int | None] | None = None,
    has_stops: bool = True,
) -> list[Case]:
    """One case a cell of the grid, in random order; a third of them with a stop string.

    `chunk_lengths` to choose from: with chunks of one token among them every burst is one step.
    """
    cases = []
    for cell in cells:
        fixed = {} if chunk_lengths is None else {"chunk_length": rng.choice(chunk_lengths)}
        cases.append(random_case(rng, family, *cell, **fixed))
    if has_stops:
        cases = [with_stop_string(rng, c, models) if rng.random() < 0.34 else c for c in cases]
    rng.shuffle(cases)
    return cases


def cells_of(value: str) -> dict[str, Any]:
    """Arguments of random_cases for bursts of several steps, and a kind of value: the cells that an
    engine with it serves, less those that a vocabulary head covers."""
    cells = [c for c in CELLS if c[0] != "explicit" or value in ("vocabulary", "trunk")]
    texts = "text" in value  # a stop string is found by solving the case, which texts make slow
    return {"cells": cells, "chunk_lengths": (None, 3, 4), "has_stops": not texts}


def run_engine(engine: Engine, cases: Sequence[Case]) -> list[RequestOutput]:
    """All cases at once, in their order."""
    return engine.generate(
        [case.input for case in cases],
        [case.params for case in cases],
        seeds=[case.seed for case in cases],
    )


def run_arrivals(
    engine: Engine, cases: Sequence[Case], rng: random.Random
) -> list[RequestOutput | Exception]:
    """Cases in their order, each some steps after the one before; books checked at each step."""
    waiting = list(range(len(cases)))
    number: dict[int, int] = {}
    ended: dict[int, RequestOutput | Exception] = {}
    while waiting or engine.has_unfinished:
        for _ in range(rng.choice([0, 0, 1, 2])):
            if waiting:
                i = waiting.pop(0)
                number[engine.add_request(cases[i].input, cases[i].params, seed=cases[i].seed)] = i
        ended.update((number[request_id], output) for request_id, output in engine.step())
        engine.check_integrity()
    held = {k: v for k, v in engine.stats().items() if k != "num_blocks" and v}
    assert not held, f"left behind: {held}"
    return [ended[i] for i in range(len(cases))]


def _close(got: float | None, wanted: float) -> bool:
    return got is not None and abs(got - wanted) <= 1e-4 + 1e-5 * abs(wanted)


def differences(output: RequestOutput, result: NaiveResult, case: Case) -> list[str]:
    """What is not as the naive search says: ids exactly, measured numbers within 1e-4."""
    got, wanted = output.outputs, result.outputs
    order = [[o.candidate_id for o in outputs] for outputs in (got, wanted)]
    if order[0] != order[1]:
        return [f"candidates {order[0]}, should be {order[1]}"]
    found = []
    if (output.seed, output.prompt_token_ids) != (case.seed, case.prompt):
        found.append("seed or prompt is not the request's")
    for a, b in zip(got, wanted, strict=True):
        exact = ["token_ids", "text", "finish_reason", "stop_reason"]
        close = ["score", "implicit_reward", "cumulative_logprob", "base_logprob"]
        wrong = [n for n in exact if getattr(a, n) != getattr(b, n)]
        wrong += [n for n in close if not _close(getattr(a, n), getattr(b, n))]
        found += [
            f"candidate {b.candidate_id}: {n} {getattr(a, n)!r}, should be {getattr(b, n)!r}"
            for n in wrong
        ]
        found += _token_differences(a, b, case.params.logprobs)
    return found


def _token_differences(a: Any, b: NaiveOutput, is_asked: bool) -> list[str]:
    found = []
    for name in ("token_logprobs", "token_rewards"):
        got, wanted = getattr(a, name), getattr(b, name)
        if not is_asked:
            if got is not None:
                found.append(f"{name} though not asked for")
        elif got is None or len(got) != len(wanted) or not all(map(_close, got, wanted)):
            found.append(f"candidate {b.candidate_id}: {name} {got}, should be {wanted}")
    return found


def is_near_tie(result: NaiveResult) -> bool:
    """Whether float32 might, rightly, decide otherwise."""
    return result.min_gap < NEAR_TIE


def compare(
    outputs: Sequence[RequestOutput], results: Sequence[NaiveResult], cases: Sequence[Case]
) -> tuple[list[str], int]:
    """(real differences, number of cases that differ but are near-ties)."""
    found, num_near_ties = [], 0
    for output, result, case in zip(outputs, results, cases, strict=True):
        wrong = differences(output, result, case)
        if wrong and is_near_tie(result):
            num_near_ties += 1
        elif wrong:
            found.append(f"{case} (gap {result.min_gap:.1e}):\n    " + "\n    ".join(wrong))
    return found, num_near_ties
