# SPDX-License-Identifier: Apache-2.0
"""The example's decode loop against whole forwards and the reference op."""

import importlib.util
from pathlib import Path

import torch
from tiny_models import tiny_model

from ivg_fast.ops.guided_sample import guided_sample_ref

EXAMPLE = Path(__file__).parents[1] / "examples" / "op_in_your_decoder.py"


def load_example():
    spec = importlib.util.spec_from_file_location("op_in_your_decoder", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_decode_loop():
    models = [tiny_model("llama", seed=seed) for seed in range(3)]
    prompt = torch.randint(0, 96, (2, 5), generator=torch.Generator().manual_seed(1))
    sampling = {"temperature": 0.7, "weight": 0.5, "top_k": 20}
    tokens = load_example().decode(models, prompt, 8, seed=4, **sampling)
    assert torch.equal(tokens[:, :5], prompt)
    with torch.inference_mode():
        for position in range(8):
            logits = [model(tokens[:, : 5 + position]).logits[:, -1] for model in models]
            expected = guided_sample_ref(
                *logits, **sampling, seeds=4, candidate_ids=[0, 1], positions=position
            )
            assert torch.equal(tokens[:, 5 + position], expected.token_ids)
