# SPDX-License-Identifier: Apache-2.0
"""Training of an explicit prefix value on (prompt, response, reward) records.

FUDGE regresses every prefix to the final reward; CD-Q regresses every prefix to the value of the
next one, and the last to the reward (Controlled Decoding, the Bellman target with the expectation
over the next token replaced by the sampled one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, run_folder
from ivg_fast.training.records import SAMPLE_COLUMNS, Record, check_records, is_whole
from ivg_fast.training.value_model import PrefixValueModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTIVES = ("fudge", "cd-q")


@dataclass(frozen=True, slots=True)
class ValueConfig:
    """Settings of `train_value`.

    `append_eos`: responses are whole texts and are valued at their EOS too, but for those that
    their record says were cut; False for responses cut at a length limit. `train_backbone` False
    trains the head alone: it then reads the hidden states of the model that gave the trunk, which
    an engine can share with that model. They are computed once and kept, 4 * hidden_size bytes a
    token.
    """

    output_dir: str
    objective: str = "fudge"
    batch_size: int = 32
    learning_rate: float = 1e-3
    epochs: float = 3.0
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    max_length: int = 512
    append_eos: bool = True
    train_backbone: bool = True
    seed: int = 0
    save_steps: int = 200
    save_dtype: str = "float32"

    def __post_init__(self) -> None:
        common.check_config(self)
        if self.objective not in OBJECTIVES:
            raise InvalidParameterError("objective", self.objective, f"must be one of {OBJECTIVES}")
        common.check_length("max_length", self.max_length)


def prefix_loss(
    values: torch.Tensor, mask: torch.Tensor, rewards: torch.Tensor, objective: str
) -> torch.Tensor:
    """Mean over texts of the mean over prefixes of (V - target)^2 / 2.

    values: float[B, T], V of each prefix; mask: bool[B, T], which of them end in a response token
    (one run a row, at least one); rewards: float[B]. Targets carry no gradient.
    """
    final = rewards[:, None].expand_as(values)
    target = final
    if objective == "cd-q":
        following = torch.nn.functional.pad(values.detach()[:, 1:], (0, 1))
        has_next = torch.nn.functional.pad(mask[:, 1:], (0, 1)).bool()
        target = torch.where(has_next, following, final)
    errors = torch.where(mask.bool(), (values - target) ** 2 / 2, 0.0)
    return (errors.sum(-1) / mask.sum(-1)).mean()


def encode(
    tokenizer: PreTrainedTokenizerBase, record: Record, max_length: int, append_eos: bool
) -> tuple[list[int], int]:
    """Token ids of prompt and response (each tokenised on its own) and the prompt's length.

    `append_eos` ends the response in EOS, unless the record says that it was cut.
    """
    prompt = list(tokenizer(record["prompt"], verbose=False)["input_ids"])
    response = tokenizer(record["response"], add_special_tokens=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id] if append_eos and is_whole(record) else []
    ids = prompt + list(response) + end
    return ids[:max_length], len(prompt)


def collate(rows: Sequence[tuple[Any, ...]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded batch of (ids, prompt length, reward); `mask` marks the response tokens.

    A fourth entry of the rows, hidden states float[T, hidden_size], becomes `hidden`.
    """
    width = max(len(ids) for ids, *_ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, num_prompt, *_) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        mask[i, num_prompt : len(ids)] = True
    rewards = torch.tensor([row[2] for row in rows], dtype=torch.float32)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mask": mask,
        "rewards": rewards,
    }
    if len(rows[0]) > 3:
        batch["hidden"] = torch.nn.utils.rnn.pad_sequence(
            [hidden for *_, hidden in rows], batch_first=True
        )
    return batch


@torch.inference_mode()
def with_hidden_states(
    model: PrefixValueModel, rows: Sequence[tuple[list[int], int, float]], batch_size: int
) -> list[tuple[Any, ...]]:
    """The rows with the trunk's hidden states on the CPU, as `collate` takes them."""
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    device = model.shared.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found: dict[int, torch.Tensor] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = collate([rows[i] for i in chosen], 0)
        ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        hidden = model.hidden_states(ids, mask).float().cpu()
        for i, states in zip(chosen, hidden, strict=True):
            found[i] = states[: len(rows[i][0])].clone()
    return [(*row, found[i]) for i, row in enumerate(rows)]


class _Objective(torch.nn.Module):
    """The value model with its loss, in the form that the Trainer wants."""

    def __init__(self, model: PrefixValueModel, objective: str) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
        rewards: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        if hidden is None:
            values = self.model.values(input_ids, attention_mask)
        else:
            values = self.model.values_of(hidden, input_ids)
        return {"loss": prefix_loss(values, mask[:, 1:], rewards, self.objective)}


def train_value(
    model: PrefixValueModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Record],
    config: ValueConfig,
) -> dict[str, Any]:
    """Train `model` on (prompt, response, reward) records and save it to `config.output_dir`.

    Returns the metrics. Run again with the same arguments after an interruption, training resumes
    at the last checkpoint.
    """
    from transformers import Trainer, TrainingArguments

    common.check_tokenizer(tokenizer)
    check_records(samples, SAMPLE_COLUMNS, "samples")
    rows = []
    for record in samples:
        ids, num_prompt = encode(tokenizer, record, config.max_length, config.append_eos)
        if len(ids) > max(num_prompt, 1):
            rows.append((ids, max(num_prompt, 1), float(record["reward"])))
    if len(rows) < config.batch_size:
        raise InvalidParameterError(
            "batch_size",
            config.batch_size,
            f"must be <= {len(rows)}, the samples whose prompt leaves room in max_length",
        )
    if not config.train_backbone:
        model.backbone.requires_grad_(False)
    common.check_positions("max_length", max(len(ids) for ids, *_ in rows), model.backbone)
    inputs = {"data": samples, "head": model.head, **run_folder.described(model.backbone)}
    folder = run_folder.open_run("value", config, inputs)
    if (done := run_folder.finished(folder)) is not None:
        return done
    num_steps = int(len(rows) // config.batch_size * config.epochs)
    arguments = common.trainer_arguments(config, folder)
    arguments |= {
        "weight_decay": config.weight_decay,
        "warmup_steps": int(config.warmup_ratio * num_steps),
        "remove_unused_columns": False,
    }
    data: Any = rows
    if not config.train_backbone:
        data = with_hidden_states(model, rows, config.batch_size)
    trainer = Trainer(
        model=_Objective(model, config.objective),
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
    )
    watch = run_folder.stopwatch(folder)
    trainer.add_callback(watch)
    result = trainer.train(resume_from_checkpoint=run_folder.last_checkpoint(folder))
    minutes = watch.minutes
    common.check_finite(model, config)
    model.save(folder, tokenizer, config.save_dtype)
    return common.write_metrics(
        folder,
        {
            "train_loss": result.training_loss,
            "num_samples": len(rows),
            "num_steps": trainer.state.global_step,
            "minutes": minutes,
        },
    )
