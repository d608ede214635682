# SPDX-License-Identifier: Apache-2.0
"""What recipes of several stages share: which are done, what they measured, which files ship."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivg_fast.errors import InvalidParameterError


class Stages:
    """Stages in folders of their own under `work`; one that has metrics.json is done."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def is_done(self, stage: str) -> bool:
        return (self.work / stage / "metrics.json").exists()

    def metrics(self, stage: str) -> dict[str, Any]:
        return json.loads((self.work / stage / "metrics.json").read_text(encoding="utf-8"))

    def open(self, stage: str, settings: dict[str, Any]) -> Path:
        """Starts a stage's folder, or goes on in one with the same settings.

        Raises:
            InvalidParameterError: it was begun with others.
        """
        folder = self.work / stage
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise InvalidParameterError(
                "work",
                str(folder),
                "was begun with other settings or prompts: choose another folder",
            )
        file.write_text(text, encoding="utf-8")
        return folder

    def export_models(self, out: Path, names: Sequence[str]) -> None:
        """Copies models and tokenizers to `out`, without the records of their runs."""
        for name in names:
            (out / name).mkdir(parents=True, exist_ok=True)
            for file in (self.work / name).iterdir():
                shipped = file.suffix in (".json", ".safetensors") and file.name not in (
                    "run.json",
                    "metrics.json",
                )
                if shipped:
                    shutil.copyfile(file, out / name / file.name)


def chosen_stages(given: str, known: Sequence[str]) -> list[str]:
    """A comma-separated choice of stages; InvalidParameterError names one that is not known."""
    stages = given.split(",")
    for stage in stages:
        if stage not in known:
            raise InvalidParameterError("stages", stage, f"must be among {known}")
    return stages
