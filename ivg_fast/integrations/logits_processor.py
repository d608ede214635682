# SPDX-License-Identifier: Apache-2.0
"""Token guidance as a LogitsProcessor, for those who cannot leave `generate`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from ivg_fast.errors import InvalidParameterError, UnsupportedModelError
from ivg_fast.models.attention import ATTENTION_NAME
from ivg_fast.models.checkpoints import check_pair
from ivg_fast.models.value_head import ValueHeadModel, as_value_model
from ivg_fast.models.vocabulary import check_same_vocabulary


class GuidanceLogitsProcessor(LogitsProcessor):
    """log_softmax(base + weight * (tuned - untuned)), the guides run beside `generate` with their
    keys and values kept (emulated fine-tuning, arXiv 2310.12962; method "implicit" of an engine).

    Rows may change places from step to step (beam search, `num_return_sequences`): each is followed
    by its tokens, among those of its prompt. Where the rows do not continue the last ones, the
    guides read them anew. The result is normalised, so that beams compare under the guided
    distribution. Ids that not every model has are never drawn.

    It runs the models by themselves: no Engine may hold them (see Engine.release_models).

    Args:
        tuned, untuned: the pair; both or none.
        value: a ValueHeadModel in the pair's place: base + weight * s(. | prefix).
        weight: any finite number.
        attention_mask: [B, T] of the prompts, padded on the left, as given to `generate`. None:
            they are not padded.
        guide_inputs: `input_ids` and `attention_mask` [B, T'] of what the guides read in place of
            the prompts. With it, or with `attention_mask`, a processor is for one batch of prompts.
        tokenizer, guide_tokenizer: of the base and of the guides; given both, the pieces behind
            their ids are compared.

    Raises:
        InvalidParameterError: an argument that cannot be, by name.
        VocabularyMismatchError: tokenizers whose ids differ.
    """

    def __init__(
        self,
        tuned: nn.Module | None = None,
        untuned: nn.Module | None = None,
        *,
        value: nn.Module | None = None,
        weight: float = 1.0,
        attention_mask: torch.Tensor | None = None,
        guide_inputs: Mapping[str, torch.Tensor] | None = None,
        tokenizer: Any = None,
        guide_tokenizer: Any = None,
    ) -> None:
        check_pair(tuned, untuned)
        if (tuned is None) == (value is None):
            raise InvalidParameterError("value", value, "must be given, or tuned and untuned")
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InvalidParameterError("weight", weight, "must be a finite number")
        self._weight = float(weight)
        pair = {"tuned": tuned, "untuned": untuned} if value is None else {"value": value}
        self._guides = [_Guide(role, model) for role, model in pair.items()]
        self._sizes = [guide.vocab_size for guide in self._guides]
        if tokenizer is not None and guide_tokenizer is not None:
            sizes = max(*self._sizes, len(tokenizer)), min(self._sizes)
            self._sizes.append(
                check_same_vocabulary(tokenizer, guide_tokenizer, *sizes, other_name="the guides")
            )
        self._mask = _checked_mask("attention_mask", attention_mask)
        self._guide_ids = self._guide_mask = None
        if guide_inputs is not None:
            self._guide_ids = guide_inputs["input_ids"]
            self._guide_mask = _checked_mask("guide_inputs", guide_inputs.get("attention_mask"))
        self._prompts: torch.Tensor | None = None  # of the batch that it is for
        self._seen: torch.Tensor | None = None
        self.num_tokens_forwarded = 0

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """f32 [B, V]: guided log-probabilities of the tokens behind `input_ids` [B, T], where the
        base's logits or log-probabilities are `scores` [B, V]."""
        self._check_batch(input_ids)
        order = self._order(input_ids)
        ids, mask = self._of_guides(input_ids)
        num_new = ids.shape[1]
        if order is not None:
            assert self._seen is not None
            num_new = input_ids.shape[1] - self._seen.shape[1]
        self._seen = input_ids.clone()
        outputs = [guide.step(ids, mask, num_new, order) for guide in self._guides]
        self.num_tokens_forwarded += num_new * len(input_ids) * len(self._guides)
        size = min(scores.shape[-1], *self._sizes)
        tilt = outputs[0][:, :size].float()
        if len(outputs) > 1:
            tilt = tilt - outputs[1][:, :size].float()
        guided = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        guided[:, :size] = scores[:, :size].float() + self._weight * tilt.to(scores.device)
        return guided.log_softmax(-1)

    def _check_batch(self, input_ids: torch.Tensor) -> None:
        """Whether these rows are of the prompts whose masks, or guides' prompts, were given."""
        if self._mask is None and self._guide_ids is None:
            return
        if self._prompts is None:
            given = self._mask if self._mask is not None else self._guide_ids
            assert given is not None
            width = input_ids.shape[1] if self._mask is None else self._mask.shape[1]
            if len(input_ids) % len(given) or input_ids.shape[1] < width:
                raise InvalidParameterError(
                    "attention_mask" if self._mask is not None else "guide_inputs",
                    tuple(given.shape),
                    f"must be of the prompts; the rows are {tuple(input_ids.shape)}",
                )
            self._prompts = input_ids[:, :width].clone()
        width = self._prompts.shape[1]
        if not torch.equal(input_ids[:, :width], self._prompts):
            raise InvalidParameterError(
                "input_ids",
                tuple(input_ids.shape),
                "must begin with the prompts that this processor is for; make one for each batch",
            )

    def _of_guides(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the guides read: ids and mask [B, T']."""
        ids, mask = input_ids, self._mask
        if self._guide_ids is not None:
            assert self._prompts is not None
            response = input_ids[:, self._prompts.shape[1] :]
            ids = torch.cat([_repeated(self._guide_ids, len(input_ids)), response], dim=1)
            mask = self._guide_mask
        whole = torch.ones_like(ids)
        if mask is not None:
            whole[:, : mask.shape[1]] = _repeated(mask, len(ids))
        return ids, whole

    def _order(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Which of the last rows each row continues; None: they do not."""
        seen = self._seen
        if seen is None or len(seen) != len(input_ids) or seen.shape[1] >= input_ids.shape[1]:
            return None
        before = input_ids[:, : seen.shape[1]]
        rows = torch.arange(len(seen), device=seen.device)
        if torch.equal(before, seen):
            return rows
        is_same = (before[:, None] == seen[None]).all(-1)
        given = self._mask if self._mask is not None else self._guide_ids
        if given is not None:  # two prompts of the same tokens may differ in what was given
            group = rows // (len(rows) // len(given))
            is_same &= group[:, None] == group
        return is_same.int().argmax(1) if bool(is_same.any(1).all()) else None


class _Guide:
    """A model and the keys and values of what it has read."""

    def __init__(self, role: str, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidParameterError(role, model, "must be a torch module")
        if model.training:
            raise InvalidParameterError(f"{role}.training", True, "must be False: call eval()")
        self._head: Any = None
        network: Any = model
        if role == "value":
            scored = as_value_model(model)
            if not isinstance(scored, ValueHeadModel):
                raise UnsupportedModelError(
                    "value must have a vocabulary head to guide tokens, got "
                    f"{type(scored).__name__}"
                )
            self._head = scored.score_head
            network = scored.backbone
        self.vocab_size: int = network.get_input_embeddings().num_embeddings
        if self._head is not None:
            self.vocab_size = min(self.vocab_size, self._head.out_features)
        self._role = role
        self._model = network
        self._takes_positions = "position_ids" in inspect.signature(network.forward).parameters
        self._cache: Any = None

    def step(
        self, ids: torch.Tensor, mask: torch.Tensor, num_new: int, order: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, V] behind the last token of `ids` [B, T], of which the last `num_new` are new."""
        if self._model.config._attn_implementation == ATTENTION_NAME:
            raise InvalidParameterError(
                self._role, type(self._model).__name__, "must not be held by an Engine"
            )
        if order is None:
            self._cache = DynamicCache(config=self._model.config)
        elif not torch.equal(order, torch.arange(len(order), device=order.device)):
            self._cache.batch_select_indices(order)
        mask = mask.to(self._model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        output = self._model(
            input_ids=ids[:, -num_new:].to(self._model.device),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **({"position_ids": positions} if self._takes_positions else {}),
        )
        if self._head is None:
            return output.logits[:, -1]
        return self._head(output.last_hidden_state[:, -1])


def _checked_mask(name: str, mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None:
        return None
    kept = mask.bool()
    if not bool(kept[:, -1].all()) or bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise InvalidParameterError(name, "zeros behind ones", "must pad on the left alone")
    return mask


def _repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    """One a row of the batch, where `generate` has several rows a prompt."""
    return rows.repeat_interleave(count // len(rows), dim=0)
