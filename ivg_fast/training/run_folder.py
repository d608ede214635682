# SPDX-License-Identifier: Apache-2.0
"""The folder of a recipe's run: what it was begun with, its checkpoints, its time, its end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.common import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def digest(records: Sequence[Any]) -> str:
    """Tells data apart: a hash of the records, in their order."""
    found = hashlib.sha256()
    for record in records:
        found.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()[:16]


def described(model: PreTrainedModel) -> dict[str, str]:
    """Where the model of a run is from, and a digest of some of each of its weights.

    Training moves nearly all weights, so that some tell other weights at the same path.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        step = max(1, weight.numel() // 64)
        some = weight.detach().flatten()[::step].float().cpu().numpy()
        found.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    return {"model": str(model.name_or_path), "weights": found.hexdigest()[:16]}


def open_run(recipe: str, config: Any, inputs: Mapping[str, str | Sequence[Any]]) -> Path:
    """Create, or reopen for resuming, the run folder `config.output_dir`.

    The first call records recipe, configuration and inputs in `run.json`, of data its digest. A
    later call with the same ones resumes.

    Raises:
        InvalidParameterError: the run was begun with others (names what differs), or the folder
            cannot be written.
    """
    folder = Path(config.output_dir)
    given = {name: v if isinstance(v, str) else digest(v) for name, v in inputs.items()}
    record = {"recipe": recipe, **dataclasses.asdict(config), **given}
    record = json.loads(json.dumps(record, default=str))
    file = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_whole(file, json.dumps(record, indent=1, sort_keys=True) + "\n")
            return folder
        before = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        requirement = f"must be a folder that can be written ({error.strerror})"
        raise InvalidParameterError("output_dir", str(folder), requirement) from error
    except ValueError as error:
        requirement = "must hold no run.json but one of a recipe"
        raise InvalidParameterError("output_dir", str(folder), requirement) from error
    for key in sorted(before.keys() | record.keys()):
        if before.get(key) != record.get(key):
            raise InvalidParameterError(
                key,
                record.get(key),
                f"must be {before.get(key)!r} to resume the run in {folder} (or choose "
                "another output_dir)",
            )
    return folder


def finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a run that has come to its end: there is nothing left to train."""
    file = folder / "metrics.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole Trainer checkpoint of a run folder, if there is one.

    The Trainer writes `trainer_state.json` last, and removes older checkpoints only then.
    """
    found = (folder / "checkpoints").glob("checkpoint-*")
    for checkpoint in sorted(found, key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


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
            write_whole(file, f"{60 * self.minutes}\n")

    return Stopwatch()
