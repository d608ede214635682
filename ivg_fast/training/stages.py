# SPDX-License-Identifier: Apache-2.0
"""What recipes of several stages share: which are done, what they measured, which files ship."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.training.common import write_whole

logger = logging.getLogger("ivg_fast")


class Stages:
    """Stages in folders of their own under `work`; one that has metrics.json is done.

    Attributes:
        settings: what the stages hang on, as JSON writes it; a folder belongs to one of them.
    """

    def __init__(self, work: Path, settings: Mapping[str, Any]) -> None:
        self.work, self.settings = work, dict(settings)

    def build(self, stages: Sequence[str]) -> None:
        """Runs those of the stages that are not done.

        Raises:
            InvalidParameterError: the work was begun with other settings.
        """
        self._begin()
        for stage in stages:
            if not self.is_done(stage):
                logger.info("stage %s", stage)
                self.run_stage(stage)

    def run_stage(self, stage: str) -> None:
        """The method of the stage's name, unless a recipe has several stages of a kind."""
        getattr(self, stage)()

    def _begin(self) -> None:
        file = self.work / "settings.json"
        text = json.dumps(self.settings, indent=1, sort_keys=True) + "\n"
        if file.exists():
            theirs, ours = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
            names = sorted(theirs.keys() | ours.keys())
            changed = [name for name in names if theirs.get(name) != ours.get(name)]
            if changed:
                raise InvalidParameterError(
                    "work",
                    str(self.work),
                    f"was begun with other settings ({', '.join(changed)}): choose another folder, "
                    "or remove its settings.json and the stages that they change",
                )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            write_whole(file, text)
        except OSError as error:
            requirement = f"must be a folder that can be written ({error.strerror})"
            raise InvalidParameterError("work", str(self.work), requirement) from error

    def is_done(self, stage: str) -> bool:
        return (self.work / stage / "metrics.json").exists()

    def metrics(self, stage: str) -> dict[str, Any]:
        return json.loads((self.work / stage / "metrics.json").read_text(encoding="utf-8"))

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


def reported(run: Callable[[], dict[str, Any]]) -> int:
    """Runs a recipe for the command line: prints its metrics as JSON.

    A line and exit status 2 on bad input, 130 where it was interrupted.
    """
    try:
        metrics = run()
    except IVGError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    print(json.dumps(metrics, sort_keys=True))
    return 0


def stages_main(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """A recipe's command, with its log; the exit status of `reported`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return reported(lambda: run(parser.parse_args(argv)))
