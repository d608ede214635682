# SPDX-License-Identifier: Apache-2.0
"""Supervised training on responses: the loss counts their tokens and end of text, no prompt's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, run_folder
from ivg_fast.training.records import Record, check_records
from ivg_fast.training.sft import SFTConfig, fit
from ivg_fast.training.value import collate, encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESPONSE_COLUMNS = {"prompt": str, "response": str}
IGNORED = -100  # the label that transformers leaves out of its loss


def response_batch(
    rows: Sequence[tuple[list[int], int]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Right-padded batch of (ids, prompt length); labels int64[B, T] are IGNORED but in responses.

    A prompt of no tokens counts as one: the first token of a text is never predicted.
    """
    batch = collate([(ids, num_prompt, 0.0) for ids, num_prompt in rows], pad_token_id)
    labels = batch["input_ids"].masked_fill(~batch["mask"], IGNORED)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": labels,
    }


def _rows(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], max_length: int
) -> list[tuple[list[int], int]]:
    """Ids and prompt lengths of the records of which a response token fits in `max_length`."""
    rows = [encode(tokenizer, record, max_length, append_eos=True) for record in records]
    return [(ids, num_prompt) for ids, num_prompt in rows if len(ids) > max(num_prompt, 1)]


def response_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    max_length: int = 512,
) -> float:
    """exp of the mean negative log-likelihood of a response token, end of text included."""
    import torch

    rows = _rows(tokenizer, records, max_length)
    if not rows:
        raise InvalidParameterError("records", len(records), "must hold a response that fits")
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for i in range(0, len(rows), 16):
            batch = response_batch(rows[i : i + 16], tokenizer.pad_token_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            num_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += model(**batch, use_cache=False).loss.item() * num_tokens
            count += num_tokens
    return math.exp(total / count)


def train_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    config: SFTConfig,
    eval_records: Sequence[Record] = (),
) -> dict[str, Any]:
    """Train `model` on the responses of (prompt, response) records; save it, return the metrics.

    Prompt and response are tokenised each on its own, as a decoder sees them; a row is one record,
    cut after `config.block_size` tokens. Run again with the same arguments after an interruption,
    training resumes at the last checkpoint.
    """
    common.check_tokenizer(tokenizer)
    check_records(records, RESPONSE_COLUMNS, "records")
    rows = _rows(tokenizer, records, config.block_size)
    if len(rows) < config.batch_size:
        raise InvalidParameterError(
            "batch_size",
            config.batch_size,
            f"must be <= {len(rows)}, the records whose prompt leaves room in block_size",
        )
    common.check_positions("block_size", max(len(ids) for ids, _ in rows), model)
    inputs = {"data": records, "eval_data": eval_records, **run_folder.described(model)}
    folder = run_folder.open_run("sft-responses", config, inputs)
    if (done := run_folder.finished(folder)) is not None:
        return done
    num_steps = int(len(rows) // config.batch_size * config.epochs)
    metrics = fit(
        model,
        tokenizer,
        rows,
        config,
        folder,
        num_steps,
        {"remove_unused_columns": False},
        lambda batch: response_batch(batch, tokenizer.pad_token_id),
    )
    metrics["num_records"] = len(rows)
    if eval_records:
        saved = common.load_model(folder)
        metrics["eval_perplexity"] = response_perplexity(
            saved, tokenizer, eval_records, config.block_size
        )
        metrics["num_eval_records"] = len(eval_records)
    return common.write_metrics(folder, metrics)
