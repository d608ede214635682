# SPDX-License-Identifier: Apache-2.0
"""IFEval's own checkers (arXiv 2311.07911), as lm-eval carries them, on responses in hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.experiments.instructions import Item
from ivg_fast.errors import IVGError


class JudgeError(IVGError, RuntimeError):
    """A judge that cannot judge here; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a response: which of its instructions it follows, to the letter and loosely (after the
    first or last line and asterisks are taken away)."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


class IFEvalJudge:
    """Args:
        nltk_data: a folder with `tokenizers/punkt_tab`, if NLTK does not find one by itself.

    Raises:
        JudgeError: lm-eval's checkers or their data are not installed.
    """

    def __init__(self, nltk_data: str | None = None) -> None:
        try:
            import nltk
        except ImportError as error:
            raise JudgeError(f"IFEval's checkers need the extra `ifeval` ({error})") from error
        if nltk_data:
            nltk.data.path.insert(0, nltk_data)
        try:
            # Before lm-eval looks for it, which would try to download it.
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            raise JudgeError(
                "IFEval's checkers split sentences with NLTK's punkt_tab, which is not here: run "
                "`python -m nltk.downloader punkt_tab`, or name a folder that has it in "
                "tokenizers/ by --nltk-data"
            ) from error
        try:
            import langdetect
            from lm_eval.tasks.ifeval import utils
        except ImportError as error:
            raise JudgeError(f"IFEval's checkers need the extra `ifeval` ({error})") from error
        langdetect.DetectorFactory.seed = 0  # it draws; the same text is to be judged the same
        self._checkers: Any = utils

    def judge(self, items: Sequence[Item], responses: Sequence[str]) -> list[Verdict]:
        """A verdict an item, by its `checks`."""
        verdicts = []
        for item, response in zip(items, responses, strict=True):
            if item.checks is None:
                raise JudgeError(f"instruction {item.index} has nothing to be checked by")
            example = self._checkers.InputExample(
                key=item.key,
                prompt=item.text,
                instruction_id_list=item.checks["instruction_id_list"],
                kwargs=item.checks["kwargs"],
            )
            strict, loose = (
                _seeded(getattr(self._checkers, f"test_instruction_following_{kind}"), item.key)(
                    example, response
                )
                for kind in ("strict", "loose")
            )
            verdicts.append(
                Verdict(
                    tuple(map(bool, strict.follow_instruction_list)),
                    tuple(map(bool, loose.follow_instruction_list)),
                )
            )
        return verdicts


def _seeded(check: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """`check` with random numbers of its own: a checker draws the arguments that it refuses, such
    as "!" for a letter, and is to draw the same for every method, strictly and loosely."""

    def run(*args: Any) -> Any:
        state = random.getstate()
        random.seed(seed)
        try:
            return check(*args)
        finally:
            random.setstate(state)

    return run
