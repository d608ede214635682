# SPDX-License-Identifier: Apache-2.0
"""What every recipe shares: loading, run folders that resume, metrics, the Trainer's arguments."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ivg_fast.errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "float16", "bfloat16")


class RecipeConfig(Protocol):
    """The fields every recipe's configuration has."""

    @property
    def output_dir(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def epochs(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def save_steps(self) -> int: ...
    @property
    def save_dtype(self) -> str: ...


def check_config(config: RecipeConfig) -> None:
    """Raise InvalidParameterError for a value no recipe can run with."""
    for name in ("batch_size", "save_steps"):
        if getattr(config, name) < 1:
            raise InvalidParameterError(name, getattr(config, name), "must be >= 1")
    for name in ("learning_rate", "epochs"):
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise InvalidParameterError(name, value, "must be positive and finite")
    if config.save_dtype not in DTYPES:
        raise InvalidParameterError("save_dtype", config.save_dtype, f"must be one of {DTYPES}")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder or hub name; it must have an EOS token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless the tokenizer has an EOS token, which also becomes a missing pad token."""
    if tokenizer.eos_token_id is None:
        raise InvalidParameterError(
            "tokenizer", tokenizer.name_or_path, "must have an EOS token (set tokenizer.eos_token)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def load_model(path: str | Path) -> PreTrainedModel:
    """A causal language model in float32, from safetensors only."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: str
) -> None:
    """Write weights (safetensors, cast to `dtype`) and tokenizer to `folder`."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open_run(recipe: str, config: Any, inputs: Mapping[str, Any]) -> Path:
    """Create, or reopen for resuming, the run folder `config.output_dir`.

    The first call records recipe, configuration and inputs in `run.json`. A later call with the
    same ones resumes; with others it raises InvalidParameterError that names what differs.
    """
    folder = Path(config.output_dir)
    record = {"recipe": recipe, **dataclasses.asdict(config), **inputs}
    record = json.loads(json.dumps(record, default=str))
    file = folder / "run.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted(before.keys() | record.keys()):
            if before.get(key) != record.get(key):
                raise InvalidParameterError(
                    key,
                    record.get(key),
                    f"must be {before.get(key)!r} to resume the run in {folder} (or choose "
                    "another output_dir)",
                )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Write `metrics.json`, with the versions that made it, and return its content."""
    import torch
    import transformers

    full = {
        **metrics,
        "precision": "bf16 autocast" if computes_bf16() else "float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    text = json.dumps(full, indent=1, sort_keys=True) + "\n"
    write_whole(folder / "metrics.json", text)
    return full


def write_whole(file: Path, text: str) -> None:
    """Writes a file that whoever is interrupted leaves as it was."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def computes_bf16() -> bool:
    """Whether the device that trains multiplies bfloat16 in hardware.

    A CPU without it converts to and fro: measured on AVX2, seven times slower than float32.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any("bf16" in name and has for name, has in torch.cpu.get_capabilities().items())


def trainer_arguments(config: RecipeConfig, folder: Path) -> dict[str, Any]:
    """Keyword arguments common to TrainingArguments and DPOConfig."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "seed": config.seed,
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "bf16": computes_bf16(),
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "dataloader_drop_last": True,
        "lr_scheduler_type": "cosine",
        "logging_steps": 20,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
    }


def stopwatch(folder: Path) -> Any:
    """A Trainer callback whose `minutes` counts the training time of all sessions of a run.

    The time of an interrupted session counts up to its last checkpoint.
    """
    from transformers import TrainerCallback

    file = folder / "checkpoints" / "seconds.txt"
    before = float(file.read_text()) if file.exists() else 0.0

    class Stopwatch(TrainerCallback):
        start = time.monotonic()

        @property
        def minutes(self) -> float:
            return (before + time.monotonic() - self.start) / 60

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            file.write_text(f"{60 * self.minutes}\n")

    return Stopwatch()


def last_checkpoint(folder: Path) -> str | None:
    """The newest Trainer checkpoint of a run folder, if there is one."""
    from transformers.trainer_utils import get_last_checkpoint

    checkpoints = folder / "checkpoints"
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
