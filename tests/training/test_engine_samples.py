# SPDX-License-Identifier: Apache-2.0
"""Samples of an engine: what belongs to which prompt, and what an interruption leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ivg_fast import SearchParams
from ivg_fast.training.engine_samples import sample_by_engine, samples_of


class Echo:
    """An engine whose outputs say what they were asked with."""

    def __init__(self, batches_left: int = 100) -> None:
        self.asked: list[str] = []
        self._batches_left = batches_left

    def generate(self, prompts, params, seeds):
        if not self._batches_left:
            raise KeyboardInterrupt
        self._batches_left -= 1
        self.asked += prompts
        asked = zip(prompts, params, seeds, strict=True)
        return [SimpleNamespace(outputs=list(self._outputs(*each))) for each in asked]

    def _outputs(self, prompt, params, seed):
        for i in range(params.n):
            text = f"{prompt} {params.temperature} {seed} {i}"
            yield SimpleNamespace(text=text, finish_reason=("stop", "length")[i % 2])


PROMPTS = [f"p{i}" for i in range(7)]
PARAMS = [
    SearchParams(max_tokens=3, n=1 + i % 3, num_candidates=3, temperature=0.1 + i) for i in range(7)
]


def rewards(numbers, responses):
    return [float(i) + len(text) / 100 for i, text in zip(numbers, responses, strict=True)]


def found(engine, folder, batch_size=3):
    return sample_by_engine(engine, PROMPTS, PARAMS, rewards, folder, seed=5, batch_size=batch_size)


def test_each_prompt_has_its_own(tmp_path) -> None:
    lines = found(Echo(), tmp_path)
    seeds = set()
    for i, (line, params) in enumerate(zip(lines, PARAMS, strict=True)):
        assert len(line["responses"]) == params.n
        assert line["are_whole"] == [True, False, True][: params.n]
        for k, (text, reward) in enumerate(zip(line["responses"], line["rewards"], strict=True)):
            prompt, temperature, seed, number = text.split()
            assert (prompt, float(temperature), int(number)) == (f"p{i}", params.temperature, k)
            assert reward == pytest.approx(i + len(text) / 100)
            seeds.add(seed)
    assert len(seeds) == len(PROMPTS)


@pytest.mark.parametrize("num_batches", [0, 1, 2])
def test_an_interruption_changes_nothing(tmp_path, num_batches) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = found(Echo(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        found(Echo(num_batches), tmp_path / "parts")
    again = Echo()
    assert found(again, tmp_path / "parts", batch_size=2) == whole
    assert again.asked == PROMPTS[3 * num_batches :]


def test_samples_are_what_recipes_read() -> None:
    lines = [
        {"responses": ["", "", "a"], "are_whole": [True, False, False], "rewards": [1.0, 2.0, 3.0]},
        {"responses": [], "are_whole": [], "rewards": []},
    ]
    assert samples_of(["p", "q"], lines) == [
        {"prompt": "p", "response": "", "reward": 1.0, "response_is_whole": True},
        {"prompt": "p", "response": "a", "reward": 3.0, "response_is_whole": False},
    ]
