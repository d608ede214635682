# SPDX-License-Identifier: Apache-2.0
"""alpaca_eval's own evaluate_from_model runs the config, and takes what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alpaca_judge import save_judge
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import Engine, EngineConfig, InvalidParameterError, SearchParams
from ivg_fast.integrations.alpaca_eval import EngineCompletions, model_config, prompt_seed

pytest.importorskip("alpaca_eval", reason="needs the extra `alpaca-eval`")
from alpaca_eval import evaluate, evaluate_from_model
from alpaca_eval.utils import load_or_convert_to_dataframe

INSTRUCTIONS = ["say a word", "name a colour", "what is it", "count to ten"]
PARAMS = SearchParams.ivg(
    max_tokens=12, beam_width=2, num_candidates=2, chunk_length=4, scorer="implicit"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models of the roles, as folders."""
    home = tmp_path_factory.mktemp("models")
    for i, (role, shape) in enumerate((("base", "llama"), ("tuned", "gpt2"), ("untuned", "gpt2"))):
        tiny_model(shape, seed=i).save_pretrained(home / role)
        tiny_tokenizer().save_pretrained(home / role)
    return {role: str(home / role) for role in ("base", "tuned", "untuned")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What to answer, with the outputs to compare with."""
    rows = [
        {"dataset": "own", "instruction": text, "output": "reference", "generator": "reference"}
        for text in INSTRUCTIONS
    ]
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(rows), "utf-8")
    return path


@pytest.fixture
def judge(tmp_path: Path) -> str:
    return str(save_judge(tmp_path))


def run(config: Any, data: Path, judge: str, out: Path, **kwargs: Any) -> list[dict[str, str]]:
    evaluate_from_model(
        model_configs=config,
        evaluation_dataset=data,
        annotators_config=judge,
        output_path=out,
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        caching_path=None,
        fn_metric="get_winrate",  # the length-controlled one asks the hub
        sort_by="win_rate",
        **kwargs,
    )
    return json.loads((out / "model_outputs.json").read_text("utf-8"))


def test_it_answers_and_is_judged(
    folders: dict[str, str], data: Path, judge: str, tmp_path: Path
) -> None:
    options = {"tuned": folders["tuned"], "untuned": folders["untuned"]}
    engine_config = EngineConfig(num_blocks=200)
    config = model_config("own", folders["base"], PARAMS, seed=3, config=engine_config, **options)
    rows = run(config, data, judge, tmp_path / "a", chunksize=3)
    completions = config["own"]["fn_completions"]
    assert [set(row) for row in rows] == [{"dataset", "instruction", "output", "generator"}] * 4
    assert [row["instruction"] for row in rows] == INSTRUCTIONS
    assert {row["generator"] for row in rows} == {"own"}
    seeds = [prompt_seed(3, text) for text in INSTRUCTIONS]
    with Engine.from_pretrained(folders["base"], **options, config=engine_config) as engine:
        outputs = engine.generate(INSTRUCTIONS, PARAMS, seeds=seeds)
        assert [row["output"] for row in rows] == [o.outputs[0].text.strip() for o in outputs]
        # Taken up again in other chunks, with an engine that is there already: the same.
        half = tmp_path / "b"
        half.mkdir()
        (half / "model_outputs.json").write_text(json.dumps(rows[:1]), "utf-8")
        again = model_config("own", engine, PARAMS, seed=3)
        assert run(again, data, judge, half, chunksize=2) == rows
        other = model_config("own", engine, PARAMS, seed=4)
        assert run(other, data, judge, tmp_path / "c") != rows, "the seed says nothing"
        again["own"]["fn_completions"].close()
        assert not engine.has_unfinished
        engine.generate("a", PARAMS)
    completions.close()
    completions.close()

    loaded = load_or_convert_to_dataframe(tmp_path / "a" / "model_outputs.json")
    assert len(loaded) == len(INSTRUCTIONS)
    leaderboard, _ = evaluate(
        model_outputs=tmp_path / "a" / "model_outputs.json",
        reference_outputs=data,
        annotators_config=judge,
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        output_path=None,
        caching_path=None,
        fn_metric="get_winrate",  # the length-controlled one asks the hub
        sort_by="win_rate",
    )
    assert leaderboard.loc["own", "win_rate"] == 100.0
    assert leaderboard.loc["own", "n_total"] == len(INSTRUCTIONS)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="prompt_template"):
        model_config("own", "base", PARAMS, prompt_template=tmp_path / "none.txt")
    with pytest.raises(InvalidParameterError, match="params"):
        EngineCompletions("base", {"max_tokens": 3})
    with (
        Engine(tiny_model("gpt2"), config=EngineConfig(num_blocks=10)) as engine,
        pytest.raises(InvalidParameterError, match="engine"),
    ):
        EngineCompletions(engine, PARAMS, tuned="x")
