# SPDX-License-Identifier: Apache-2.0
"""The plain decoder of the reward experiment against one without caches or batched selection."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ivg_fast.training.sft import new_gpt2
from ivg_fast.training.tokenizer import train_tokenizer
from ivg_fast.training.value_model import PrefixValueModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.experiments.plain_decode import Method, Models, decode, generate

TEXTS = [f"the film {i} was great and awful, boring and lovely {i * i}" for i in range(40)]


@pytest.fixture(scope="module")
def models() -> Models:
    tokenizer = train_tokenizer(TEXTS, 280, 64)

    def sharp(seed: int):
        model = new_gpt2(tokenizer, 2, 32, 64, seed)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data *= 6
        return model.eval()

    value = PrefixValueModel(sharp(3).base_model, "vocabulary").eval()
    torch.nn.init.normal_(value.delta)
    return Models(sharp(0), sharp(1), sharp(2), value, tokenizer)


@torch.inference_mode()
def naive(models, prompts, method, max_tokens, temperature, generator):
    """No caches: every step runs whole texts; candidates are tuples in lists."""
    copies = method.beam_width * method.num_candidates
    pools = [[(prompt.tolist(), 0.0) for _ in range(copies)] for prompt in prompts]
    eos = models.tokenizer.eos_token_id
    for t in range(max_tokens):
        ids = torch.tensor([candidate for pool in pools for candidate, _ in pool])
        logits = [m(ids).logits[:, -1].float() for m in (models.base, models.tuned, models.untuned)]
        z = (logits[0] + method.weight * (logits[1] - logits[2])) / temperature
        z[:, eos] = -torch.inf
        tokens = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0].tolist()
        ratio = logits[1].log_softmax(-1) - logits[2].log_softmax(-1)
        row = 0
        for pool in pools:
            for i, (candidate, total) in enumerate(pool):
                token = tokens[row]
                pool[i] = ([*candidate, token], total + ratio[row, token].item())
                row += 1
        last = t + 1 == max_tokens
        if copies == 1 or not (
            last or (method.chunk_length and (t + 1) % method.chunk_length == 0)
        ):
            continue
        for g, pool in enumerate(pools):
            if method.scorer == "explicit":
                scores = [models.value.values(torch.tensor([c]))[0, -1].item() for c, _ in pool]
            else:
                scores = [total for _, total in pool]
            ranked = sorted(range(copies), key=lambda i: -scores[i])[: method.beam_width]
            # child c of the survivor of rank r has index c * W + r
            pools[g] = [pool[i] for _ in range(method.num_candidates) for i in ranked]
    return [pool[0][0][prompts.shape[1] :] for pool in pools]


METHODS = [
    Method("base"),
    Method("eft", 1.3),
    Method("cbs", 0.0, 2, 3, 4, "explicit"),
    Method("w2ss", 0.0, 3, 2, 4, "implicit"),
    Method("ivg", 0.8, 2, 2, 3, "explicit"),
    Method("best-of-n", 0.0, 1, 5, None, "explicit"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_decode_equals_the_naive_decoder(models, method):
    prompts = torch.tensor([models.tokenizer(text)["input_ids"][:4] for text in TEXTS[:3]])
    runs = [
        function(models, prompts, method, 10, 0.7, torch.Generator().manual_seed(5))
        for function in (decode, naive)
    ]
    assert runs[0].tolist() == runs[1]


def test_search_raises_the_score_that_it_searches_for(models):
    prompts = [text[:14] for text in TEXTS[:6]]

    def mean_value(method: Method) -> float:
        values = []
        for prompt, response in zip(prompts, generate(models, prompts, method, 12), strict=True):
            ids = torch.tensor([models.tokenizer(prompt + response)["input_ids"]])
            with torch.no_grad():
                values.append(models.value.values(ids)[0, -1].item())
        return sum(values) / len(values)

    assert mean_value(METHODS[2]) > mean_value(METHODS[0])
