# SPDX-License-Identifier: Apache-2.0
"""Token guidance inside stock generate: equal to the engine, incremental, rows that move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import fresh_seed, value_model
from generate_cases import EOS, SHAPES, VOCAB, expected, family, guides, padded, prompts_of
from tiny_models import tiny_model, tiny_tokenizer
from transformers import LogitsProcessorList

from ivg_fast import (
    Engine,
    EngineConfig,
    InvalidParameterError,
    Prompt,
    SearchParams,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from ivg_fast.integrations.logits_processor import GuidanceLogitsProcessor

SEED = fresh_seed()
LENGTHS = (5, 11, 1, 17)
CONFIG = EngineConfig(num_blocks=200)


def run(models: dict[str, Any], inputs: Any, processor: Any, **kwargs: Any) -> torch.Tensor:
    return models["base"].generate(
        **inputs, logits_processor=LogitsProcessorList([processor]), **kwargs
    )


def oracle(
    models: dict[str, Any], prompt: list[int], response: list[int], weight: float, kind: str
) -> torch.Tensor:
    """float64 [T, V]: guided log-probabilities at each token of the response, by full forwards."""
    ids = torch.tensor([prompt + response])

    def logits(role: str) -> torch.Tensor:
        model = models[role]
        out = model(ids)
        out = out if isinstance(out, torch.Tensor) else out.logits
        return out[0, len(prompt) - 1 : -1].double()

    tilt = logits("value") if kind == "value" else logits("tuned") - logits("untuned")
    return (logits("base") + weight * tilt).log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["pair", "value"])
def test_greedy_is_the_engine_with_one_candidate(shape: str, kind: str) -> None:
    models, prompts = family(shape, SEED), prompts_of(SEED, LENGTHS)
    inputs = padded(prompts)
    roles = ("value",) if kind == "value" else ("tuned", "untuned")
    params = SearchParams(
        max_tokens=14,
        temperature=0.0,
        guidance="explicit" if kind == "value" else "implicit",
        guidance_weight=0.8,
    )
    with Engine(models["base"], config=CONFIG, **guides(models, *roles)) as engine:
        outputs = engine.generate(prompts, params)
    processor = GuidanceLogitsProcessor(
        **guides(models, *roles), weight=0.8, attention_mask=inputs["attention_mask"]
    )
    ours = run(models, inputs, processor, max_new_tokens=14, do_sample=False)
    assert torch.equal(ours, expected(inputs, [o.outputs[0].token_ids for o in outputs]))
    width = inputs["input_ids"].shape[1]
    steps = ours.shape[1] - width
    per_row = (width + steps - 1) * len(prompts)
    assert processor.num_tokens_forwarded == per_row * len(roles), "each token once a guide"


def test_without_the_mask_padded_rows_differ() -> None:
    """The control of the test above: the mask is what makes padded rows right."""
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, LENGTHS))
    found = [
        run(
            models,
            inputs,
            GuidanceLogitsProcessor(**guides(models), weight=2.0, attention_mask=mask),
            max_new_tokens=14,
        )
        for mask in (inputs["attention_mask"], None)
    ]
    assert found[0].shape != found[1].shape or not torch.equal(found[0], found[1])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_probabilities_are_the_oracles_as_rows_move(num_beams: int) -> None:
    """Beam search takes each step's log-probabilities; the sum over a beam is checked in float64,
    and the guides must have followed every beam."""
    models, prompts = family("gpt2", SEED), prompts_of(SEED, (5, 9))
    inputs = padded(prompts)
    processor = GuidanceLogitsProcessor(
        **guides(models), weight=0.9, attention_mask=inputs["attention_mask"]
    )
    options: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True}
    options |= {"output_scores": True, "eos_token_id": None, "pad_token_id": 0}
    if num_beams == 1:
        torch.manual_seed(SEED)
        options |= {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    else:
        options |= {"num_beams": num_beams, "num_return_sequences": num_beams}
        options |= {"length_penalty": 0.0}
    out = run(models, inputs, processor, **options)
    width = inputs["input_ids"].shape[1]
    for i, row in enumerate(out.sequences):
        response = row[width:].tolist()
        table = oracle(models, prompts[i // 3], response, 0.9, "pair")
        chosen = table[torch.arange(len(response)), torch.tensor(response)]
        if num_beams == 1:
            seen = torch.stack([step[i] for step in out.scores]).double()
            torch.testing.assert_close(seen, table, atol=1e-4, rtol=1e-4)
        else:
            score = out.sequences_scores[i].double()
            torch.testing.assert_close(score, chosen.sum(), atol=1e-3, rtol=1e-4)
    steps = out.sequences.shape[1] - width
    assert processor.num_tokens_forwarded == 2 * (width + steps - 1) * 6, "a row was read anew"


def test_beams_move_in_that_test() -> None:
    """Its control: rows do change places."""
    models, inputs = family("gpt2", SEED), padded(prompts_of(SEED, (5, 9)))
    moved = []

    class Watch(GuidanceLogitsProcessor):
        def _order(self, input_ids: torch.Tensor) -> torch.Tensor | None:
            order = super()._order(input_ids)
            if order is not None:
                moved.append(not torch.equal(order, torch.arange(len(order))))
            return order

    processor = Watch(**guides(models), attention_mask=inputs["attention_mask"])
    run(models, inputs, processor, max_new_tokens=8, num_beams=3, eos_token_id=None, pad_token_id=0)
    assert any(moved)


def test_prompts_of_the_guides() -> None:
    models, prompts = family("llama", SEED), prompts_of(SEED, (5, 3))
    others = prompts_of(SEED + 1, (2, 12))
    inputs = padded(prompts)
    asked = [Prompt(raw=a, tuned=b, untuned=b) for a, b in zip(prompts, others, strict=True)]
    params = SearchParams.eft(max_tokens=10, temperature=0.0)
    with Engine(models["base"], config=CONFIG, **guides(models)) as engine:
        outputs = engine.generate(asked, params)
    processor = GuidanceLogitsProcessor(
        **guides(models), guide_inputs=padded(others), attention_mask=inputs["attention_mask"]
    )
    ours = run(models, inputs, processor, max_new_tokens=10)
    assert torch.equal(ours, expected(inputs, [o.outputs[0].token_ids for o in outputs]))
    with pytest.raises(InvalidParameterError, match="make one for each batch"):
        run(models, padded(prompts_of(SEED + 2, (5, 3))), processor, max_new_tokens=2)


def test_equal_prompts_keep_the_guides_prompts_of_their_own() -> None:
    """A beam that moves is not followed into another prompt of the same tokens, whose guides have
    read something else."""
    models, (own,) = family("llama", SEED), prompts_of(SEED, (5,))
    ids = torch.tensor([own] * 4)  # two prompts, two beams each
    apart = {"guide_inputs": padded(prompts_of(SEED + 1, (4, 7)))}
    moving, anew = (GuidanceLogitsProcessor(**guides(models), **apart) for _ in range(2))
    scores = torch.zeros(4, VOCAB)
    moving(ids, scores)
    first = torch.cat([ids, torch.tensor([[3], [4], [3], [4]])], dim=1)
    moving(first, scores)
    # The first prompt's beams change places, so that rows are looked for.
    second = torch.cat([first[[1, 0, 2, 3]], torch.tensor([[5], [6], [7], [8]])], dim=1)
    anew(ids, scores)
    anew._seen = None
    torch.testing.assert_close(moving(second, scores), anew(second, scores), atol=1e-4, rtol=1e-4)
    assert moving.num_tokens_forwarded == 2 * 4 * (7 + 1 + 1), "a row was read anew"


def test_an_unpadded_processor_is_for_any_number_of_calls() -> None:
    models = family("llama", SEED)
    processor = GuidanceLogitsProcessor(**guides(models))
    for seed in (1, 2):
        inputs = padded(prompts_of(seed, (6, 6)))
        fresh = GuidanceLogitsProcessor(**guides(models))
        options = {"max_new_tokens": 7}
        assert torch.equal(
            run(models, inputs, processor, **options), run(models, inputs, fresh, **options)
        )


def test_ids_that_a_guide_has_not_are_never_drawn() -> None:
    base = tiny_model("gpt2", seed=SEED, vocab_size=VOCAB + 3)
    models = {**family("gpt2", SEED), "base": base}
    scores = torch.zeros(1, VOCAB + 3)
    out = GuidanceLogitsProcessor(**guides(models))(torch.tensor([[3, 4]]), scores)
    assert out[0, VOCAB:].tolist() == [-torch.inf] * 3
    assert out.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_refusals() -> None:
    models = family("gpt2", SEED)
    pair = guides(models)
    with pytest.raises(InvalidParameterError, match="value"):
        GuidanceLogitsProcessor()
    with pytest.raises(InvalidParameterError, match="value"):
        GuidanceLogitsProcessor(**pair, value=models["value"])
    with pytest.raises(InvalidParameterError, match="untuned"):
        GuidanceLogitsProcessor(models["tuned"])
    with pytest.raises(InvalidParameterError, match="weight"):
        GuidanceLogitsProcessor(**pair, weight=float("nan"))
    with pytest.raises(InvalidParameterError, match="attention_mask"):
        GuidanceLogitsProcessor(**pair, attention_mask=torch.tensor([[1, 0]]))
    scalar = value_model("gpt2", vocab_size=VOCAB, seed=1, is_scalar=True)
    with pytest.raises(UnsupportedModelError, match="vocabulary head"):
        GuidanceLogitsProcessor(value=scalar)
    with pytest.raises(VocabularyMismatchError):
        GuidanceLogitsProcessor(
            **pair, tokenizer=tiny_tokenizer(97), guide_tokenizer=tiny_tokenizer(90)
        )
    processor = GuidanceLogitsProcessor(**pair, attention_mask=torch.ones(3, 4))
    with pytest.raises(InvalidParameterError, match="attention_mask"):
        processor(torch.ones(2, 4, dtype=torch.long), torch.zeros(2, VOCAB))
    with (
        Engine(models["base"], config=CONFIG, **pair),
        pytest.raises(InvalidParameterError, match="tuned must not be held by an Engine"),
    ):
        GuidanceLogitsProcessor(**pair)(torch.tensor([[1, 2]]), torch.zeros(1, VOCAB))
    assert EOS < VOCAB
