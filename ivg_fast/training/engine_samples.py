# SPDX-License-Identifier: Apache-2.0
"""Responses of an engine, guided or not, with their rewards; what is done is not done again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ivg_fast.prompts import derive_seed
from ivg_fast.training.records import Record, flag_of, whole_lines

if TYPE_CHECKING:
    from ivg_fast import Engine, SearchParams

logger = logging.getLogger("ivg_fast")


def sample_by_engine(
    engine: Engine,
    prompts: Sequence[str],
    params: Sequence[SearchParams],
    reward: Callable[[Sequence[int], Sequence[str]], Sequence[float]],
    folder: Path,
    *,
    seed: int,
    batch_size: int,
) -> list[Record]:
    """All outputs of each prompt.

    Every prompt has a seed of its own and a line in `folder/batches.jsonl`, written with its batch:
    an interrupted run goes on behind the last of them, and gives what a whole one gives.

    Args:
        params: of each prompt.
        reward: rewards of responses, given the number of the prompt that each answers.
        batch_size: prompts a batch.

    Returns:
        {"responses": texts, "are_whole": whether each ended by itself, "rewards": floats} a prompt.
    """
    file = folder / "batches.jsonl"
    begin = len(whole_lines(file))
    with file.open("a", encoding="utf-8") as handle:
        for first in range(begin, len(prompts), batch_size):
            numbers = range(first, min(first + batch_size, len(prompts)))
            outputs = engine.generate(
                [prompts[i] for i in numbers],
                [params[i] for i in numbers],
                seeds=[derive_seed(seed, i) for i in numbers],
            )
            found = [output.outputs for output in outputs]
            owners = [i for i, own in zip(numbers, found, strict=True) for _ in own]
            rewards = iter(reward(owners, [each.text for own in found for each in own]))
            for own in found:
                line = {
                    "responses": [each.text for each in own],
                    "are_whole": [each.finish_reason == "stop" for each in own],
                    "rewards": [float(next(rewards)) for _ in own],
                }
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            handle.flush()
            logger.info("%s: %d of %d prompts", folder.name, numbers.stop, len(prompts))
    return whole_lines(file)


def samples_of(prompts: Sequence[str], found: Sequence[Record]) -> list[Record]:
    """Samples, as recipes read them, out of what `sample_by_engine` found for each prompt."""
    return [
        {"prompt": prompt, "response": text, "reward": reward, flag_of("response"): is_whole}
        for prompt, line in zip(prompts, found, strict=True)
        for text, is_whole, reward in zip(
            line["responses"], line["are_whole"], line["rewards"], strict=True
        )
        if text or is_whole
    ]
