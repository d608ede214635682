# SPDX-License-Identifier: Apache-2.0
"""IVG the way the public implementations run it, on today's transformers.

One prompt at a time, repeated W*K times; base, tuned and untuned in turn, eager, one forward a
token; the whole cache of each model re-indexed at each selection; torch.multinomial; scorers run on
the whole text at each selection. Their known mistakes are not repeated: positions under left
padding are right, and the sampled ids are scored, not re-tokenised text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bench.baselines.common import (
    BaselineResult,
    ValueModel,
    check_length,
    check_request,
    chunk_length,
    private_view,
    stop_ids,
)
from ivg_fast.params import SearchParams


def _warpers(params: SearchParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers


class _CachedModel:
    """A HF model, its DynamicCache, and the head that gives next-token logits."""

    def __init__(self, model: nn.Module, head_weight: Tensor | None) -> None:
        self.model = model
        self.head_weight = head_weight
        self.cache = DynamicCache(config=model.config)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits [B, V] behind all of `ids` [B, S], of which the cache holds a beginning."""
        new = ids[:, self.cache.get_seq_length() :]
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if self.head_weight is None:
            return self.model(new, logits_to_keep=1, **options).logits[:, -1]
        hidden = self.model(new, **options).last_hidden_state[:, -1]
        return hidden @ self.head_weight.T


class ReferenceStyleIVG:
    """The public implementations' way of doing guided chunk-level beam search.

    Args:
        base: the model that is steered, a HF causal LM.
        tuned, untuned: the pair of the implicit value; None where no request uses it.
        value: the explicit value; None where no request uses it.
        eos_token_ids: ids that end a response.
        device, dtype: where and in which precision to run; weights are shared with the given models
            where these agree.
    """

    def __init__(
        self,
        base: nn.Module,
        tuned: nn.Module | None = None,
        untuned: nn.Module | None = None,
        value: ValueModel | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if (tuned is None) != (untuned is None):
            raise ValueError("tuned and untuned must be given together")
        self.device = torch.device(device)
        self.eos_token_ids = tuple(eos_token_ids)
        models = {"base": base, "tuned": tuned, "untuned": untuned}
        if value is not None:
            models["value"] = value.backbone
        self._models = {
            role: private_view(model, "sdpa", self.device, dtype)
            for role, model in models.items()
            if model is not None
        }
        self._head = None if value is None else value.head_weight.to(self.device, dtype)

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SearchParams, seed: int = 0
    ) -> list[BaselineResult]:
        """The best response to each prompt; prompt i draws from a generator seeded with seed + i.

        Raises:
            ValueError: for a request that the models or this baseline cannot serve.
        """
        check_request(
            prompt_ids, params, has_pair="tuned" in self._models, has_value=self._head is not None
        )
        for model in self._models.values():
            check_length(model, max(map(len, prompt_ids)) + params.max_tokens)
        results = []
        for index, ids in enumerate(prompt_ids):
            generator = torch.Generator(self.device).manual_seed(seed + index)
            results.append(self._search(list(ids), params, generator))
        return results

    def _search(
        self, prompt: list[int], params: SearchParams, generator: torch.Generator
    ) -> BaselineResult:
        width, fanout = params.beam_width, params.num_candidates
        stops = torch.tensor(stop_ids(self.eos_token_ids, params), device=self.device)
        roles = {"none": ("base",), "implicit": ("base", "tuned", "untuned")}
        roles["explicit"] = ("base", "value")
        models = {
            role: _CachedModel(self._models[role], self._head if role == "value" else None)
            for role in roles[params.guidance]
        }
        ids = torch.tensor([prompt] * (width * fanout), device=self.device)
        lengths = torch.full((len(ids),), params.max_tokens, device=self.device)
        limit = len(prompt) + params.max_tokens
        while True:
            end = min(ids.shape[1] + chunk_length(params), limit)
            while ids.shape[1] < end:
                tokens = self._sample(models, ids, params, generator)
                ids = torch.cat([ids, tokens[:, None]], dim=1)
                num_new = ids.shape[1] - len(prompt)
                stopped = torch.isin(tokens, stops) & (lengths > num_new)
                lengths = torch.where(stopped, num_new, lengths)
                if bool((lengths <= num_new).all()):
                    break
            num_new = ids.shape[1] - len(prompt)
            scores = self._score(ids, len(prompt), lengths.clamp(max=num_new), params)
            best = torch.sort(scores, descending=True, stable=True).indices[:width]
            if ids.shape[1] >= limit or bool((lengths[best] <= num_new).all()):
                winner = int(best[0])
                response = ids[winner, len(prompt) : len(prompt) + int(lengths[winner])]
                return BaselineResult(response.tolist(), float(scores[winner]))
            rows = best.repeat(fanout)  # child c of rank r is row c*W + r
            ids, lengths = ids[rows], lengths[rows]
            for model in models.values():
                model.cache.reorder_cache(rows)

    @staticmethod
    def _sample(
        models: dict[str, _CachedModel],
        ids: Tensor,
        params: SearchParams,
        generator: torch.Generator,
    ) -> Tensor:
        logits = {role: model.next_logits(ids).float() for role, model in models.items()}
        combined = logits["base"]
        if params.guidance == "implicit":
            combined = combined + params.guidance_weight * (logits["tuned"] - logits["untuned"])
        elif params.guidance == "explicit":
            combined = combined + params.guidance_weight * logits["value"]
        if params.temperature == 0:
            return combined.argmax(dim=-1)
        probs = torch.softmax(_warpers(params)(ids, combined), dim=-1)
        return torch.multinomial(probs, 1, generator=generator)[:, 0]

    def _score(
        self, ids: Tensor, prompt_length: int, lengths: Tensor, params: SearchParams
    ) -> Tensor:
        """Scores [B] of the whole prefixes: `lengths` [B] tokens behind the prompt."""
        if params.scorer == "none":
            return torch.zeros(len(ids), device=ids.device)
        num_tokens = prompt_length + lengths
        longest = int(num_tokens.max())
        columns = torch.arange(longest, device=ids.device) - (longest - num_tokens)[:, None]
        options: dict[str, Any] = {"use_cache": False}
        if bool((columns[:, 0] < 0).any()):
            options["attention_mask"] = (columns >= 0).long()
            options["position_ids"] = columns.clamp(min=0)
        text = ids.gather(1, columns.clamp(min=0))
        if params.scorer == "explicit":
            hidden = self._models["value"](text, **options).last_hidden_state
            assert self._head is not None
            logits = hidden @ self._head.T
            return logits[:, -2].gather(1, text[:, -1:])[:, 0].float()
        in_response = columns[:, 1:] >= prompt_length
        rewards = torch.zeros(len(ids), device=ids.device)
        for role, sign in (("tuned", 1.0), ("untuned", -1.0)):
            logits = self._models[role](text, **options).logits[:, :-1].float()
            logprobs = torch.log_softmax(logits, dim=-1).gather(2, text[:, 1:, None])[..., 0]
            rewards += sign * (logprobs * in_response).sum(dim=1)
        return rewards
