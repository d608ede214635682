# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation by TRL's DPOTrainer, with LoRA (PEFT) as an option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, run_folder
from ivg_fast.training.records import PAIR_COLUMNS, Record, check_records, flag_of, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class DPORecipe:
    """Settings of `train_dpo`.

    `append_eos`: responses are whole texts and end in EOS; False for responses cut at a length
    limit. `lora_rank` 0 trains all weights.
    """

    output_dir: str
    beta: float = 0.1
    batch_size: int = 32
    learning_rate: float = 5e-4
    epochs: float = 3.0
    weight_decay: float = 0.05
    warmup_ratio: float = 0.25
    max_length: int = 512
    append_eos: bool = True
    lora_rank: int = 0
    seed: int = 0
    save_steps: int = 200
    save_dtype: str = "float32"

    def __post_init__(self) -> None:
        common.check_config(self)
        if not 0 < self.beta < float("inf"):
            raise InvalidParameterError("beta", self.beta, "must be positive and finite")
        if self.lora_rank < 0:
            raise InvalidParameterError("lora_rank", self.lora_rank, "must be >= 0")
        common.check_length("max_length", self.max_length)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, pair: Record, append_eos: bool
) -> dict[str, list[int]]:
    """Ids of prompt, chosen and rejected, each tokenised on its own, as a decoder sees them.

    TRL tokenises prompt + response as one text, which loses the prompt's last token where a
    response goes on with its last word, and ends every response in EOS, even one that was cut.
    """
    ids = {"prompt_ids": list(tokenizer(pair["prompt"], verbose=False)["input_ids"])}
    for side in ("chosen", "rejected"):
        response = tokenizer(pair[side], add_special_tokens=False, verbose=False)["input_ids"]
        end = [tokenizer.eos_token_id] if append_eos and is_whole(pair, side) else []
        ids[f"{side}_ids"] = [*response, *end]
    return ids


def usable_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Record], config: DPORecipe
) -> tuple[list[Record], int]:
    """The pairs of which both responses have a token within `max_length`, and the most tokens that
    a text of theirs has."""
    kept, longest = [], 0
    for pair in pairs:
        ids = token_ids(tokenizer, pair, config.append_eos)
        num_prompt = len(ids["prompt_ids"])
        sizes = [len(ids[f"{side}_ids"]) for side in ("chosen", "rejected")]
        if num_prompt < config.max_length and min(sizes) > 0:
            kept.append(pair)
            longest = max(longest, min(config.max_length, num_prompt + max(sizes)))
    return kept, longest


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Record],
    config: DPORecipe,
) -> dict[str, Any]:
    """Train `model` on (prompt, chosen, rejected) records against itself as the reference.

    Saves the tuned model (LoRA merged) to `config.output_dir` and returns its metrics. Run again
    with the same arguments after an interruption, training resumes at the last checkpoint.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    common.check_tokenizer(tokenizer)
    check_records(pairs, PAIR_COLUMNS, "pairs")
    kept, longest = usable_pairs(tokenizer, pairs, config)
    if len(kept) < config.batch_size:
        raise InvalidParameterError(
            "batch_size",
            config.batch_size,
            f"must be <= {len(kept)}, the pairs of two responses, with tokens, whose prompt leaves "
            "room in max_length",
        )
    common.check_positions("max_length", longest, model)
    inputs = {"data": pairs, **run_folder.described(model)}
    folder = run_folder.open_run("dpo", config, inputs)
    if (done := run_folder.finished(folder)) is not None:
        return done
    rows = Dataset.from_list(
        [
            {name: pair[name] for name in PAIR_COLUMNS}
            | {flag_of(side): is_whole(pair, side) for side in ("chosen", "rejected")}
            for pair in kept
        ]
    )
    num_steps = int(len(rows) // config.batch_size * config.epochs)
    arguments = common.trainer_arguments(config, folder)
    arguments |= {
        "beta": config.beta,
        "max_length": config.max_length,
        "weight_decay": config.weight_decay,
        "warmup_steps": int(config.warmup_ratio * num_steps),
        "gradient_checkpointing": False,
    }
    peft_config = None
    if config.lora_rank:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train_dataset = trainer.train_dataset.map(
        lambda pair: token_ids(tokenizer, pair, config.append_eos)
    )
    watch = run_folder.stopwatch(folder)
    trainer.add_callback(watch)
    result = trainer.train(resume_from_checkpoint=run_folder.last_checkpoint(folder))
    minutes = watch.minutes
    tuned = trainer.model.merge_and_unload() if config.lora_rank else trainer.model
    common.check_finite(tuned, config)
    common.save_model(tuned, tokenizer, folder, config.save_dtype)
    logs = [log for log in trainer.state.log_history if "rewards/accuracies" in log]
    return common.write_metrics(
        folder,
        {
            "train_loss": result.training_loss,
            "train_accuracy_last": logs[-1]["rewards/accuracies"] if logs else None,
            "num_pairs": len(rows),
            "num_steps": trainer.state.global_step,
            "minutes": minutes,
        },
    )
