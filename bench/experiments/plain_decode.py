# SPDX-License-Identifier: Apache-2.0
"""Base, EFT, chunk-level beam search and IVG in plain PyTorch, many prompts at a time.

Written to be read, and to be right: stock models, stock KV caches, whole texts re-scored at every
boundary. Prompts decoded together have the same number of tokens, so nothing is ever padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ivg_fast.training.value_model import PrefixValueModel


@dataclass(frozen=True, slots=True)
class Method:
    """Token-wise implicit guidance of `weight`, and W, K, L with a scorer of prefixes."""

    name: str
    weight: float = 0.0
    beam_width: int = 1
    num_candidates: int = 1
    chunk_length: int | None = None
    scorer: Literal["none", "implicit", "explicit"] = "none"


@dataclass(frozen=True, slots=True)
class Models:
    base: PreTrainedModel
    untuned: PreTrainedModel
    tuned: PreTrainedModel
    value: PrefixValueModel
    tokenizer: PreTrainedTokenizerBase


class _Rows:
    """One model's KV cache and its logits for the next token of every row."""

    def __init__(self, model: PreTrainedModel, prompts: torch.Tensor, copies: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.forward(prompts)
        self.reorder(torch.arange(len(prompts)).repeat_interleave(copies))

    def forward(self, ids: torch.Tensor) -> None:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.logits = output.logits[:, -1].float()

    def reorder(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.logits = self.logits[rows]


@torch.inference_mode()
def decode(
    models: Models,
    prompts: torch.Tensor,
    method: Method,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Best response int64[G, max_tokens] for prompts int64[G, P]; EOS is never drawn."""
    num_prompts, num_prompt_tokens = prompts.shape
    width, copies = method.beam_width, method.beam_width * method.num_candidates
    needs_pair = method.weight != 0 or method.scorer == "implicit"
    base = _Rows(models.base, prompts, copies)
    pair = [_Rows(model, prompts, copies) for model in (models.tuned, models.untuned) if needs_pair]
    ids = prompts.repeat_interleave(copies, 0)
    implicit = torch.zeros(len(ids))
    for t in range(max_tokens):
        z = base.logits
        if method.weight:
            z = z + method.weight * (pair[0].logits - pair[1].logits)
        z = z / temperature
        z[:, models.tokenizer.eos_token_id] = -torch.inf
        token = torch.multinomial(z.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, token], 1)
        if needs_pair:
            tuned, untuned = (rows.logits.log_softmax(-1).gather(1, token) for rows in pair)
            implicit = implicit + (tuned - untuned)[:, 0]
        is_last = t + 1 == max_tokens
        is_boundary = is_last or (method.chunk_length and (t + 1) % method.chunk_length == 0)
        if is_boundary and copies > 1:
            scores = models.value.values(ids)[:, -1] if method.scorer == "explicit" else implicit
            order = scores.view(num_prompts, copies).sort(dim=-1, descending=True, stable=True)
            best = order.indices[:, :width] + copies * torch.arange(num_prompts)[:, None]
            rows = best.repeat(1, method.num_candidates).flatten()
            ids, implicit = ids[rows], implicit[rows]
            if not is_last:
                for state in (base, *pair):
                    state.reorder(rows)
        if not is_last:
            for state in (base, *pair):
                state.forward(ids[:, -1:])
    return ids[::copies, num_prompt_tokens:]


def generate(
    models: Models,
    prompts: Sequence[str],
    method: Method,
    max_tokens: int = 50,
    temperature: float = 0.7,
    seed: int = 0,
    max_prompts: int = 16,
) -> list[str]:
    """Best response to each prompt; prompts of equal token count share a batch."""
    encoded = [models.tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    generator = torch.Generator().manual_seed(seed)
    responses = [""] * len(prompts)
    for members in by_length.values():
        for start in range(0, len(members), max_prompts):
            group = members[start : start + max_prompts]
            batch = torch.tensor([encoded[i] for i in group])
            rows = decode(models, batch, method, max_tokens, temperature, generator)
            for i, row in zip(group, rows.tolist(), strict=True):
                responses[i] = models.tokenizer.decode(row)
    return responses
