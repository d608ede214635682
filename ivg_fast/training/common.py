# SPDX-License-Identifier: Apache-2.0
"""What every recipe shares: loading, checks, metrics, the Trainer's arguments."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ivg_fast.errors import InvalidParameterError

if TYPE_CHECKING:
    import torch
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
    def weight_decay(self) -> float: ...
    @property
    def warmup_ratio(self) -> float: ...
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
    if not 0 <= config.weight_decay < float("inf"):
        raise InvalidParameterError("weight_decay", config.weight_decay, "must be >= 0 and finite")
    if not 0 <= config.warmup_ratio < 1:
        raise InvalidParameterError("warmup_ratio", config.warmup_ratio, "must be in [0, 1)")
    check_seed(config.seed)
    if config.save_dtype not in DTYPES:
        raise InvalidParameterError("save_dtype", config.save_dtype, f"must be one of {DTYPES}")


def check_seed(seed: int) -> None:
    """Raise InvalidParameterError for a seed that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise InvalidParameterError("seed", seed, "must be in [0, 2**32)")


def check_length(name: str, value: int) -> None:
    """Raise InvalidParameterError where texts of `value` tokens have none that is predicted."""
    if value < 2:
        raise InvalidParameterError(name, value, "must be >= 2")


def check_positions(name: str, num_tokens: int, model: PreTrainedModel) -> None:
    """Raise InvalidParameterError where a text is longer than the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_tokens > limit:
        requirement = f"must keep texts within the model's {limit} positions"
        raise InvalidParameterError(name, f"{num_tokens} tokens", requirement)


def check_finite(model: torch.nn.Module, config: RecipeConfig) -> None:
    """Raise InvalidParameterError where training has ended in weights that are no numbers."""
    import torch

    if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        requirement = "must be lower: the weights are no longer finite"
        raise InvalidParameterError("learning_rate", config.learning_rate, requirement)


def _not_loadable(parameter: str, path: str | Path, error: Exception) -> InvalidParameterError:
    reason = str(error).strip().partition("\n")[0]
    requirement = f"must be a folder, or a hub name within reach, that holds one ({reason})"
    return InvalidParameterError(parameter, str(path), requirement)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder or hub name.

    Raises:
        InvalidParameterError: there is none, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loadable("tokenizer", path, error) from error
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
    """A causal language model in float32, from safetensors only.

    Raises:
        InvalidParameterError: there is none, or it lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ivg_fast.models.loading import check_complete

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise _not_loadable("model", path, error) from error
    check_complete("model", str(path), loading)
    return model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: str
) -> None:
    """Write weights (safetensors, cast to `dtype`) and tokenizer to `folder`."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
