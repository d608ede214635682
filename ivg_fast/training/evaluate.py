# SPDX-License-Identifier: Apache-2.0
"""How well a value ranks: pairwise accuracy of implicit and explicit values on held-out pairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.records import PAIR_COLUMNS, Record, check_records, flag_of, is_whole
from ivg_fast.training.value import collate, encode
from ivg_fast.training.value_model import PrefixValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _batches(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], append_eos: bool, size: int = 64
) -> list[dict[str, torch.Tensor]]:
    rows = [(*encode(tokenizer, r, tokenizer.model_max_length, append_eos), 0.0) for r in records]
    return [collate(rows[i : i + size], tokenizer.pad_token_id) for i in range(0, len(rows), size)]


@torch.inference_mode()
def response_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    append_eos: bool = False,
) -> list[float]:
    """log p(response | prompt), summed over tokens, of each (prompt, response) record."""
    model.eval()
    result: list[float] = []
    for batch in _batches(tokenizer, records, append_eos):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        ids = batch["input_ids"]
        output = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)
        logits = output.logits[:, :-1].float()
        picked = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        result += (picked * batch["mask"][:, 1:]).sum(-1).tolist()
    return result


@torch.inference_mode()
def final_values(
    model: PrefixValueModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    append_eos: bool = False,
) -> list[float]:
    """V of each whole (prompt, response) record, at its last token."""
    model.eval()
    result: list[float] = []
    for batch in _batches(tokenizer, records, append_eos):
        values = model.values(batch["input_ids"], batch["attention_mask"])
        last = batch["attention_mask"].sum(-1) - 2
        result += values.gather(-1, last[:, None])[:, 0].tolist()
    return result


def implicit_values(
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    append_eos: bool = False,
) -> list[float]:
    """log p_tuned - log p_untuned of each response."""
    ours = response_logprobs(tuned, tokenizer, records, append_eos)
    reference = response_logprobs(untuned, tokenizer, records, append_eos)
    return [a - b for a, b in zip(ours, reference, strict=True)]


def ranked(pairs: Sequence[Record]) -> list[Record]:
    """The pairs with the response of the higher reward as the chosen one, whatever was drawn."""
    swap = {"chosen": "rejected", "rejected": "chosen"}
    return [
        {
            re.sub("^(chosen|rejected)", lambda side: swap[side[0]], name): pair[name]
            for name in pair
        }
        if pair["rejected_reward"] > pair["chosen_reward"]
        else dict(pair)
        for pair in pairs
    ]


def accuracies(
    pairs: Sequence[Record],
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    value: PrefixValueModel,
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool = False,
    value_prompt: Callable[[str], str] = str,
) -> dict[str, float]:
    """Pairwise accuracy of the implicit and of the explicit value against the pairs' rewards.

    `value_prompt` makes the explicit value's prompt of a pair's.
    """
    both = sides(ranked(pairs))
    of_value = [[{**r, "prompt": value_prompt(r["prompt"])} for r in side] for side in both]
    return {
        "num_heldout_pairs": len(pairs),
        "implicit_accuracy": pairwise_accuracy(
            *(implicit_values(tuned, untuned, tokenizer, side, append_eos) for side in both)
        ),
        "value_accuracy": pairwise_accuracy(
            *(final_values(value, tokenizer, side, append_eos) for side in of_value)
        ),
    }


def sides(pairs: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The chosen and the rejected responses as (prompt, response) records."""
    check_records(pairs, PAIR_COLUMNS, "pairs")
    chosen, rejected = (
        [
            {
                "prompt": pair["prompt"],
                "response": pair[side],
                flag_of("response"): is_whole(pair, side),
            }
            for pair in pairs
        ]
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def pairwise_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen side scores higher; a tie counts half."""
    if not chosen or len(chosen) != len(rejected):
        raise InvalidParameterError("rejected", len(rejected), f"must be {len(chosen)} and not 0")
    wins = sum((c > r) + (c == r) / 2 for c, r in zip(chosen, rejected, strict=True))
    return wins / len(chosen)
