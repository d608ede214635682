# SPDX-License-Identifier: Apache-2.0
"""Every example runs on the bundled family, and does what it says."""

from __future__ import annotations

import importlib.util
import io
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import Engine, EngineConfig, ScoreInput, SearchParams
from ivg_fast.assets import imdb_path

EXAMPLES = Path(__file__).parents[2] / "examples"
FAMILY = [str(imdb_path() / role) for role in ("base", "tuned", "untuned", "value")]
# name -> (arguments, standard input, words of the output)
RUNS = {
    "op_in_your_decoder": ([*FAMILY[:3], "I saw this film"], "", ["I saw this film"]),
    "own_loop": (FAMILY, "I saw\n\nThe plot of\n", ["I saw", "The plot of", "InvalidParameter"]),
    "custom_value": ([FAMILY[0], "I saw this film"], "", ["calls for 5 selections"]),
}
# Those that other tests run: tests/integrations/test_ray_data.py.
ELSEWHERE = {"ray_batch"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, *ELSEWHERE}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments, text, words = RUNS[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == []


def test_a_loop_of_ones_own_gives_what_generate_gives() -> None:
    prompts = ["the cat", "", "a dog", "that house", "x" * 300]
    params = SearchParams(max_tokens=9, temperature=0.0)
    with Engine(
        tiny_model("gpt2", seed=1), tiny_tokenizer(), config=EngineConfig(num_blocks=9)
    ) as engine:
        results = dict(load("own_loop").serve(engine, prompts, params, max_waiting=1))
        expected = engine.generate([prompts[i] for i in (0, 2, 3)], params)
    assert set(results) == set(prompts)
    for output in expected:
        assert results[output.prompt].outputs[0].token_ids == output.outputs[0].token_ids
    assert "must have a token" in str(results[""])
    assert "positions of base" in str(results["x" * 300])


def test_the_lexicon_as_a_value_counts_whole_words() -> None:
    lexicon = load("custom_value").Lexicon()
    texts = [("a great film", False), ("a great", False), ("a great", True), ("bad, bad!", True)]
    inputs = [ScoreInput("p", text, (), is_finished) for text, is_finished in texts]
    assert lexicon(inputs[:2]) == [1.0, 0.0]
    assert lexicon(inputs) == [1.0, 0.0, 1.0, -2.0]
    params = SearchParams.best_of_n(3, max_tokens=5, seed=2)
    with Engine(
        tiny_model("gpt2", seed=1),
        tiny_tokenizer(),
        value=lexicon,
        config=EngineConfig(num_blocks=20),
    ) as engine:
        engine.generate("the cat", params)
        assert lexicon.num_calls > 2
        assert lexicon._known
    assert not lexicon._known
