# SPDX-License-Identifier: Apache-2.0
"""What differs between experiments: how responses are sampled, and who judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.experiments.families import Family, Prompts
from bench.experiments.measures import (
    Measure,
    gold_measure,
    lexicon_measure,
    rouge_measure,
    summary_measure,
)
from bench.experiments.methods import SAMPLING


@dataclass(frozen=True, slots=True)
class Task:
    """An experiment's responses and judges.

    Attributes:
        name: the module's; reports look their words up by it.
        sampling: fields of SearchParams that all methods share; "max_tokens", "temperature".
        gold: the reward, of a family and a device.
        second: the judge beside it, of the prompts by split.
    """

    name: str
    sampling: Mapping[str, Any]
    gold: Callable[[Family, str], Measure]
    second: Callable[[Mapping[str, Prompts]], Measure]


SENTIMENT = Task("controlled_sentiment", SAMPLING, gold_measure, lambda _: lexicon_measure())
# The paper's summarization (arXiv 2409.17819): T 0.7, 128 tokens at most, a line or an end of text.
SUMMARIZATION = Task(
    "summarization",
    {"max_tokens": 128, "temperature": 0.7, "stop": "\n"},
    summary_measure,
    rouge_measure,
)
