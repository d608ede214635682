# SPDX-License-Identifier: Apache-2.0
"""The prompts shipped with the package: held-out test prompts and dev prompts."""

from __future__ import annotations

from ivg_fast.assets import imdb_path
from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.records import read_jsonl


def _prompts(split: str, n: int) -> list[str]:
    records = read_jsonl(imdb_path() / "prompts.jsonl", {"split": str, "prompt": str})
    prompts = [record["prompt"] for record in records if record["split"] == split]
    if not 1 <= n <= len(prompts):
        raise InvalidParameterError("n", n, f"must be in [1, {len(prompts)}]")
    return prompts[:n]


def test_prompts(n: int) -> list[str]:
    """The first `n` prompts from reviews that no model and no reward was fit on."""
    return _prompts("test", n)


def dev_prompts(n: int) -> list[str]:
    """The first `n` prompts for choosing settings; none of them is a test prompt."""
    return _prompts("dev", n)


test_prompts.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it
