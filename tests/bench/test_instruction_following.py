# SPDX-License-Identifier: Apache-2.0
"""The command of instruction following on tiny models: parts, merge, resumption, reports."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from alpaca_judge import save_judge
from instruct_standins import save_paper, save_recipe

from bench.experiments import instruction_following
from bench.experiments.ifeval import IFEvalJudge
from bench.experiments.instruction_following import main, parser, rank_of, setup_of
from bench.experiments.instructions import Item
from bench.experiments.setups import load_engine, method_params
from bench.experiments.shards import _lines
from ivg_fast import Engine, EngineConfig, SearchParams
from ivg_fast.integrations.alpaca_eval import prompt_seed
from ivg_fast.request import ROLES
from ivg_fast.templates import TEMPLATES

COUNT = 7
SMALL = ["--num-blocks", "600", "--chunk-length", "6"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_paper(tmp_path_factory.mktemp("paper"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    path = tmp_path / "instructions.json"
    rows = [
        {"dataset": f"d{i}", "instruction": f"say {i}", "output": "r", "generator": "reference"}
        for i in range(COUNT)
    ]
    path.write_text(json.dumps(rows), "utf-8")
    return path


@pytest.fixture
def ifeval(tmp_path: Path) -> Path:
    path = tmp_path / "ifeval.jsonl"
    kinds = [
        ("punctuation:no_comma", {}),
        ("change_case:english_lowercase", {}),
        ("keywords:forbidden_words", {"forbidden_words": ["th"]}),
    ]
    rows = [
        {
            "key": 1000 + i,
            "prompt": f"say {i}",
            "instruction_id_list": [kind for kind, _ in kinds[: 1 + i % 3]],
            "kwargs": [kwargs for _, kwargs in kinds[: 1 + i % 3]],
        }
        for i in range(COUNT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def nltk_data(tmp_path: Path) -> str:
    """An untrained punkt_tab: enough to load, and sentences are not what is tested here."""
    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).touch()
    return str(tmp_path / "nltk")


def paper_arguments(models: dict[str, str], instructions: Path, out: Path) -> list[str]:
    paths = [word for role in ROLES for word in (f"--{role}", models[role])]
    return ["--preset", "tulu", *paths, "--instructions", str(instructions), "--out", str(out)]


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / "outputs" / f"{name}.json").read_text("utf-8"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 tokens take too long here: 190 tokens in all."""
    made = instruction_following.paper_setup

    def shortened(*args: Any, **kwargs: Any) -> Any:
        from dataclasses import replace

        return replace(made(*args, **kwargs), max_length=190)

    monkeypatch.setattr(instruction_following, "paper_setup", shortened)


@pytest.mark.usefixtures("short")
def test_tulu_from_end_to_end(
    models: dict[str, str],
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*paper_arguments(models, instructions, tmp_path / "whole"), *SMALL]
    assert main(arguments) == 0
    rows = rows_of(tmp_path / "whole", "base-tulu-ivg")
    assert [row["instruction"] for row in rows] == [f"say {i}" for i in range(COUNT)]
    assert [row["dataset"] for row in rows] == [f"d{i}" for i in range(COUNT)]

    # What the engine says with the preset's settings, templates and lengths.
    params = SearchParams.ivg(
        max_tokens=1, beam_width=2, num_candidates=2, chunk_length=6, temperature=0.7, top_k=50
    )
    templates = {
        "base": "llama-2-chat",
        "tuned": "tulu",
        "untuned": "tulu",
        "value": "human-assitant",
    }
    with Engine.from_pretrained(
        *(models[role] for role in ROLES), templates=templates, config=EngineConfig(num_blocks=600)
    ) as engine:
        for row in rows[:2]:
            text = TEMPLATES["llama-2-chat"].render(row["instruction"])
            left = 190 - len(engine.tokenizer(text).input_ids) - 1  # and the begin-of-text
            limited = SearchParams.ivg(**{**_fields(params), "max_tokens": left})
            seeds = [prompt_seed(0, row["instruction"])]
            (output,) = engine.generate([row["instruction"]], limited, seeds=seeds)
            assert row["output"] == output.outputs[0].text.strip()
            is_full = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 190
            assert is_full or output.outputs[0].finish_reason == "stop"

    # Two ranks that know nothing of each other, the second interrupted in the middle of a line.
    parts = [*paper_arguments(models, instructions, tmp_path / "parts"), *SMALL]
    parts += ["--batch-size", "2", "--world-size", "2"]
    assert main([*parts, "--rank", "0"]) == 0
    assert main([*parts, "--merge"]) == 2
    assert "3 of 7 instructions have no response yet" in capsys.readouterr().err
    assert main([*parts, "--rank", "1"]) == 0
    (file,) = (tmp_path / "parts" / "shards" / "1-of-2").glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"instruction": "sa')
    assert main([*parts, "--merge"]) == 2
    assert main([*parts, "--rank", "1"]) == 0
    outputs = [json.loads(line)["output"] for line in whole.splitlines()[1:]]
    assert [record["output"] for record in _lines(file)[1:]] == outputs
    assert main([*parts, "--merge"]) == 0
    assert rows_of(tmp_path / "parts", "base-tulu-ivg") == rows

    # Nothing is left for any rank, so no model is loaded; another seed is another run.
    with monkeypatch.context() as patch:
        patch.setattr(instruction_following, "load_engine", None)
        assert main([*parts, "--rank", "0"]) == 0
    other = [*parts[:-2], "--seed", "1"]
    assert main(other) == 0
    assert rows_of(tmp_path / "parts", "base-tulu-ivg") != rows, "the seed says nothing"


def _fields(params: SearchParams) -> dict[str, Any]:
    names = ("beam_width", "num_candidates", "chunk_length", "temperature", "top_k")
    return {name: getattr(params, name) for name in names}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("preset", "shape", "paper_base"),
    [
        ("ultra", "llama", "meta-llama/Llama-2-70b-chat-hf"),
        ("tulu", "mistral", "mistralai/Mistral-7B-Instruct-v0.2"),
        ("tulu", "mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    ],
)
def test_other_bases_run(
    preset: str, shape: str, paper_base: str, instructions: Path, tmp_path: Path
) -> None:
    arguments = paper_arguments(save_paper(tmp_path / "m", shape), instructions, tmp_path / "o")
    arguments[1] = preset
    arguments += [*SMALL, "--paper-base", paper_base, "--value-template", "human-assistant"]
    assert main([*arguments, "--num-prompts", "2", "--methods", "base", "ivg"]) == 0
    texts = [rows_of(tmp_path / "o", f"base-{preset}-{m}")[0]["output"] for m in ("base", "ivg")]
    assert texts[0] != texts[1]


@pytest.mark.usefixtures("short")
def test_alpaca_eval_takes_the_file(
    models: dict[str, str], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("alpaca_eval", reason="needs the extra `alpaca-eval`")
    annotators = save_judge(tmp_path)
    arguments = [*paper_arguments(models, instructions, tmp_path / "o"), *SMALL]
    arguments += ["--num-prompts", "3", "--judge", str(instructions), "--plain-win-rate"]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--annotators", annotators.name]) == 0
    (row,) = json.loads((tmp_path / "o" / "win_rates.json").read_text()).values()
    assert row["generator"] == "base-tulu-ivg"
    assert row["win_rate"] == 100.0
    assert row["n_total"] == 3

    from alpaca_eval.utils import get_generator_name, load_or_convert_to_dataframe

    loaded = load_or_convert_to_dataframe(tmp_path / "o" / "outputs" / "base-tulu-ivg.json")
    assert len(loaded) == 3
    assert get_generator_name(None, loaded) == "base-tulu-ivg"
    assert set(loaded.columns) == {"dataset", "instruction", "output", "generator"}


def test_without_a_key_nothing_is_decoded(
    models: dict[str, str],
    instructions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("alpaca_eval", reason="needs the extra `alpaca-eval`")
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    arguments = paper_arguments(models, instructions, tmp_path / "o")
    assert main([*arguments, "--judge", str(instructions)]) == 2
    assert "set OPENAI_API_KEY" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main([*arguments, "--judge", str(instructions), "--annotators", "nobody"]) == 2
    assert "annotators must be a configuration" in capsys.readouterr().err


def test_a_reference_that_is_not_one_is_refused_before_decoding(
    models: dict[str, str], instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("alpaca_eval", reason="needs the extra `alpaca-eval`")
    arguments = paper_arguments(models, instructions, tmp_path / "o")
    arguments += ["--annotators", str(save_judge(tmp_path)), "--judge"]
    assert main([*arguments, str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err
    rows = json.loads(instructions.read_text("utf-8"))[2:]
    (tmp_path / "few.json").write_text(json.dumps(rows), "utf-8")
    assert main([*arguments, str(tmp_path / "few.json")]) == 2
    assert "judge must have all instructions; it lacks 2" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("--paper-base mistralai/Mistral-7B-Instruct-v0.2", "paper_base"),
        ("--value-template human-assistant", "value_template"),
        ("--nltk-data somewhere", "nltk_data"),
        ("--annotators someone", "annotators"),
        ("--plain-win-rate", "plain_win_rate"),
    ],
)
def test_options_that_would_say_nothing_are_refused(
    recipe: Path, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    given: str, what: str,
) -> None:  # fmt: skip
    arguments = ["--recipe", str(recipe), "--instructions", str(instructions)]
    assert main([*arguments, "--out", str(tmp_path / "o"), *given.split()]) == 2
    assert f"error: {what} must be left out without" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_models_and_devices_that_are_not_there_are_named(
    models: dict[str, str], instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = paper_arguments(models, instructions, tmp_path / "o")
    for given, message in (
        (["--tuned", str(tmp_path / "absent")], "error: tuned must be a folder"),
        (["--device", "abacus"], "error: device must be"),
    ):
        assert main([*arguments, *given]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_ifeval_with_guides_of_the_recipe(
    recipe: Path, ifeval: Path, nltk_data: str, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `ifeval`")
    pytest.importorskip("langdetect", reason="needs the extra `ifeval`")
    arguments = ["--recipe", str(recipe), "--ifeval", str(ifeval), "--out", str(tmp_path / "o")]
    arguments += [*SMALL, "--max-tokens", "20", "--num-prompts", "5", "--nltk-data", nltk_data]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text("utf-8"))
    assert set(summary["methods"]) == {"base", "eft", "cbs", "ivg"}
    assert {"ivg - eft", "ivg - cbs", "ivg - base", "eft - base"} <= set(summary["differences"])
    assert summary["num_in_file"] == COUNT
    lines = (tmp_path / "o" / "per_prompt.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 5
    # An oracle for one of the kinds: a prompt with that alone.
    for method in ("base", "ivg"):
        name = f"untuned-recipe-{method}"
        outputs = {r["instruction"]: r["output"] for r in rows_of(tmp_path / "o", name)}
        for line in lines[1:]:
            key, count, who, strict, _ = line.split(",")
            text = outputs.get(f"say {int(key) - 1000}")
            if who == method and count == "1":
                assert int(strict) == ("," not in text and bool(text.strip()))
    report = (tmp_path / "o" / "report.md").read_text("utf-8")
    assert "5 of 7 prompts" in report
    assert str(tmp_path) not in report
    assert "say " not in report + json.dumps(summary)

    # A larger subset goes on from the smaller one.
    shards = sorted((tmp_path / "o" / "shards").glob("*/*.jsonl"))
    before = {file: file.read_bytes() for file in shards}
    arguments[arguments.index("5")] = "7"
    assert main(arguments) == 0
    for file, text in before.items():
        assert file.read_bytes().startswith(text)
        assert len(_lines(file)) == 1 + 7


def test_a_checker_that_draws_draws_the_same(nltk_data: str) -> None:
    """lm-eval's letter checker refuses "!" and counts a random letter in its place."""
    pytest.importorskip("lm_eval", reason="needs the extra `ifeval`")
    pytest.importorskip("langdetect", reason="needs the extra `ifeval`")
    kwargs = [{"letter": "!", "let_frequency": 2, "let_relation": "at least"}]
    checks = {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": kwargs}
    items = [Item(i, "p", "", checks, i) for i in range(30)]
    judge = IFEvalJudge(nltk_data)
    texts = ["The quick brown fox jumps over the lazy dog."] * 30
    random.seed(0)
    first = judge.judge(items, texts)
    assert judge.judge(items, texts) == first
    assert all(verdict.strict == verdict.loose for verdict in first)
    assert len({verdict.strict for verdict in first}) == 2, "it no longer draws"
    drawn = random.random()
    random.seed(0)
    assert random.random() == drawn  # others' random numbers are theirs


def test_without_sentence_data_nothing_is_decoded(
    recipe: Path,
    ifeval: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nltk = pytest.importorskip("nltk", reason="needs the extra `ifeval`")
    monkeypatch.setattr(nltk.data, "path", [])
    arguments = ["--recipe", str(recipe), "--ifeval", str(ifeval), "--out", str(tmp_path / "o")]
    assert main(arguments) == 2
    assert "punkt_tab" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_value_of_the_recipe_takes_the_trunk_of_tuned(recipe: Path) -> None:
    setup = setup_of(parser().parse_args(["--recipe", str(recipe), "--ifeval", "x", "--out", "y"]))
    params = SearchParams.ivg(max_tokens=12, beam_width=2, num_candidates=2, chunk_length=4, seed=1)
    config = EngineConfig(num_blocks=200)
    with load_engine(setup, config=config) as engine:
        (shared,) = engine.generate("say it", params)
    with Engine.from_pretrained(
        *(setup.models[role] for role in ROLES), templates=setup.templates, config=config
    ) as engine:
        (apart,) = engine.generate("say it", params)
    assert shared.outputs[0].token_ids == apart.outputs[0].token_ids
    assert shared.outputs[0].score == pytest.approx(apart.outputs[0].score, rel=1e-4)
    assert sum(shared.stats.score_tokens.values()) < sum(apart.stats.score_tokens.values())


def test_presets_are_the_papers() -> None:
    arguments = ["--instructions", "x", "--out", "y", "--preset"]
    setup = setup_of(parser().parse_args([*arguments, "ultra"]))
    assert setup.models["tuned"] == "chadlzx/llama-ultrafeedback-dpo"
    assert setup.templates["value"] == "human-assitant"
    assert setup.guide_vocabulary == "same"
    mistral = "mistralai/Mistral-7B-Instruct-v0.2"
    other = ["tulu", "--paper-base", mistral, "--value-template", "human-assistant"]
    setup = setup_of(parser().parse_args([*arguments, *other]))
    assert (setup.models["base"], setup.templates["base"]) == (mistral, "mistral-instruct")
    assert setup.models["untuned"] == "allenai/tulu-2-7b"
    assert setup.templates["value"] == "human-assistant"
    assert setup.guide_vocabulary == "shared_pieces"
    p = setup.params
    assert (p.beam_width, p.num_candidates, p.chunk_length) == (2, 2, 30)
    assert (p.temperature, p.top_k, setup.max_length) == (0.7, 50, 2048)


def test_methods_differ_in_guidance_and_search_alone() -> None:
    ivg = SearchParams.ivg(max_tokens=9, temperature=0.7, top_k=50)
    assert method_params("ivg", ivg) == ivg
    base, eft, cbs = (method_params(name, ivg) for name in ("base", "eft", "cbs"))
    assert (base.guidance, base.pool_size, base.scorer) == ("none", 1, "none")
    assert (eft.guidance, eft.pool_size, eft.scorer) == ("implicit", 1, "none")
    assert (cbs.guidance, cbs.pool_size, cbs.scorer) == ("none", ivg.pool_size, "explicit")
    assert {p.temperature for p in (base, eft, cbs)} == {0.7}
    assert {p.top_k for p in (base, eft, cbs)} == {50}


def test_ranks_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    made = parser().parse_args(["--recipe", "r", "--ifeval", "x", "--out", "y"])
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank_of(made).name == "2-of-4"
    made.rank, made.world_size = 0, 1
    assert rank_of(made).name == "0-of-1"
    made.world_size, made.rank = None, 4
    with pytest.raises(ValueError, match="rank"):
        rank_of(made)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        rank_of(made)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{}", "must be a list"),
        ("x.json", '[{"instruction": 3}]', "must be str"),
        ("x.json", "[", "not JSON"),
    ],
)
def test_bad_instructions(
    recipe: Path, tmp_path: Path, name: str, text: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text)
    arguments = ["--recipe", str(recipe), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--instructions", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_an_unfinished_recipe_is_refused(
    tmp_path: Path, instructions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", str(tmp_path / "none"), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--instructions", str(instructions)]) == 2
    assert "finished recipe" in capsys.readouterr().err
