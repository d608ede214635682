# SPDX-License-Identifier: Apache-2.0
"""Supervised training of a causal language model on texts, by the transformers Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, run_folder
from ivg_fast.training.packing import pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True, slots=True)
class SFTConfig:
    """Settings of `train_sft`.

    `epochs` counts passes over the texts, `block_size` tokens. `schedule` "wsd" holds the learning
    rate until the last `decay_ratio` of the steps, "cosine" lowers it all the way.
    """

    output_dir: str
    block_size: int = 512
    batch_size: int = 16
    learning_rate: float = 5e-5
    epochs: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    decay_ratio: float = 0.4
    seed: int = 0
    save_steps: int = 200
    save_dtype: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        common.check_config(self)
        if self.optimizer not in OPTIMIZERS:
            raise InvalidParameterError("optimizer", self.optimizer, f"must be one of {OPTIMIZERS}")
        if self.schedule not in SCHEDULES:
            raise InvalidParameterError("schedule", self.schedule, f"must be one of {SCHEDULES}")
        common.check_length("block_size", self.block_size)
        held = 1 - self.warmup_ratio if self.schedule == "wsd" else 1
        if not 0 <= self.decay_ratio < held:
            requirement = f"must be in [0, {held:g}), beside warmup_ratio"
            raise InvalidParameterError("decay_ratio", self.decay_ratio, requirement)


def new_gpt2(
    tokenizer: PreTrainedTokenizerBase,
    num_layers: int,
    hidden_size: int,
    num_positions: int = 512,
    seed: int = 0,
) -> PreTrainedModel:
    """A GPT-2-shaped model with random weights, heads of 64 (of 32 below hidden size 128)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    head_size = 64 if hidden_size >= 128 else 32
    if num_layers < 1 or hidden_size < 1 or hidden_size % head_size:
        raise InvalidParameterError(
            "(num_layers, hidden_size)",
            (num_layers, hidden_size),
            f"must be >= 1 and a multiple of {head_size}",
        )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=num_positions,
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=hidden_size // head_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int = 512,
) -> float:
    """exp of the mean negative log-likelihood of a token, each text (and its EOS) on its own.

    Texts are cut after `max_length` tokens; the first token of a text is given, not predicted.
    """
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for text in texts:
            ids = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
            row = torch.tensor([ids[:max_length]], device=model.device)
            loss = model(input_ids=row, labels=row, use_cache=False).loss.item()
            total += loss * (row.shape[1] - 1)
            count += row.shape[1] - 1
    if count == 0:
        raise InvalidParameterError("texts", len(texts), "must hold a text of two tokens or more")
    return math.exp(total / count)


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: SFTConfig,
    eval_texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Train `model` on `texts`, save it to `config.output_dir`, return the metrics written there.

    Rows are packed (see `packing.pack`). Run again with the same arguments after an interruption,
    training resumes at the last checkpoint.
    """
    from torch.utils.data import Dataset

    common.check_tokenizer(tokenizer)
    if not texts:
        raise InvalidParameterError("texts", texts, "must not be empty")
    common.check_positions("block_size", config.block_size, model)
    documents = tokenizer(list(texts), verbose=False)["input_ids"]
    rows = pack(
        documents, config.block_size, tokenizer.eos_token_id, config.seed, math.ceil(config.epochs)
    )
    rows = rows[: max(config.batch_size, int(len(rows) * config.epochs / math.ceil(config.epochs)))]
    if len(rows) < config.batch_size:
        raise InvalidParameterError(
            "batch_size",
            config.batch_size,
            f"must be <= {len(rows)}, the rows of block_size tokens that the texts fill",
        )
    inputs = {"data": texts, "eval_data": eval_texts, **run_folder.described(model)}
    folder = run_folder.open_run("sft", config, inputs)
    if (metrics := run_folder.finished(folder)) is not None:
        return metrics

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = rows[index].astype("int64")
            return {"input_ids": ids, "labels": ids}

    num_steps = len(rows) // config.batch_size
    # The rows already are all the epochs, in random order.
    order = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    metrics = fit(model, tokenizer, Rows(), config, folder, num_steps, order)
    metrics["train_tokens"] = num_steps * config.batch_size * config.block_size
    if eval_texts:
        saved = common.load_model(folder)
        metrics["eval_perplexity"] = perplexity(saved, tokenizer, eval_texts, config.block_size)
        metrics["num_eval_texts"] = len(eval_texts)
    return common.write_metrics(folder, metrics)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    config: SFTConfig,
    folder: Path,
    num_steps: int,
    arguments: dict[str, Any],
    data_collator: Any = None,
) -> dict[str, Any]:
    """Train `model` on `rows` from the last checkpoint on and save it: the metrics of the run.

    `num_steps` is what the schedule is laid out for; `arguments` go to TrainingArguments.
    """
    from transformers import Trainer, TrainingArguments

    arguments = common.trainer_arguments(config, folder) | arguments
    arguments["warmup_steps"] = int(config.warmup_ratio * num_steps)
    arguments["weight_decay"] = config.weight_decay
    if config.schedule == "wsd":
        arguments["lr_scheduler_type"] = "warmup_stable_decay"
        arguments["lr_scheduler_kwargs"] = {
            "num_decay_steps": int(config.decay_ratio * num_steps),
            "decay_type": "linear",
        }
    optimizer = None
    if config.optimizer == "muon":
        from ivg_fast.training.optim import MuonAdamW

        optimizer = MuonAdamW(model, config.learning_rate, config.weight_decay)
    model.config.use_cache = False
    if config.compile:
        model.compile()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=data_collator,
        optimizers=(optimizer, None),
    )
    watch = run_folder.stopwatch(folder)
    trainer.add_callback(watch)
    result = trainer.train(resume_from_checkpoint=run_folder.last_checkpoint(folder))
    minutes = watch.minutes
    model.config.use_cache = True
    common.check_finite(model, config)
    common.save_model(model, tokenizer, folder, config.save_dtype)
    return {
        "train_loss": result.training_loss,
        "num_steps": trainer.state.global_step,
        "num_parameters": model.num_parameters(),
        "minutes": minutes,
    }
