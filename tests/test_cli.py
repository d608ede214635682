# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, reads and refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    _C,
    Engine,
    EngineConfig,
    InvalidParameterError,
    Prompt,
    ResponseScorer,
    SearchParams,
    Template,
)
from ivg_fast.cli import EXIT_FAILED, EXIT_OK, EXIT_USAGE, build_parser, main
from ivg_fast.cli.generate import Ask, Lines
from ivg_fast.loop import RequestLoop


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    paths = {}
    for seed, role in enumerate(("base", "tuned", "untuned")):
        paths[role] = root / role
        tiny_model("llama", seed=seed).save_pretrained(paths[role])
        tiny_tokenizer().save_pretrained(paths[role])
    value = tiny_model("llama", seed=9)
    paths["value"] = root / "value"
    value.config.save_pretrained(paths["value"])
    state = {k: v for k, v in value.state_dict().items() if k != "lm_head.weight"}
    save_file(
        {**state, "score_head.weight": value.lm_head.weight}, paths["value"] / "model.safetensors"
    )
    return paths


def _models(folders: dict[str, Path]) -> list[str]:
    return [word for role, path in folders.items() for word in (f"--{role}", str(path))]


def test_jsonl_is_what_the_engine_returns(folders, capsys, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the cat"}\n\n{"prompt": "a dog", "id": [1]}\n', "utf-8")
    options = "--method ivg --max-tokens 9 --chunk-length 3 --seed 7 --n 3 --stop Q --stop Z"
    arguments = ["generate", *_models(folders), "--file", str(file), *options.split()]
    assert main([*arguments, "--format", "jsonl", "--num-blocks", "200"]) == EXIT_OK
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    params = SearchParams.ivg(max_tokens=9, chunk_length=3, seed=7, n=3, stop=("Q", "Z"))
    paths = [folders[role] for role in ("base", "tuned", "untuned", "value")]
    with Engine.from_pretrained(*paths, config=EngineConfig(num_blocks=200)) as engine:
        expected = engine.generate(["the cat", "a dog"], params)
    assert [line["prompt"] for line in lines] == ["the cat", "a dog"]
    assert ["id" in line for line in lines] == [False, True]
    assert lines[1]["id"] == [1]
    for line, output in zip(lines, expected, strict=True):
        assert [o["token_ids"] for o in line["outputs"]] == [o.token_ids for o in output.outputs]
        assert line["outputs"][0]["score"] == pytest.approx(output.outputs[0].score)
        assert line["stats"]["num_selections"] == output.stats.num_selections


def test_prompts_from_stdin_as_text(folders, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one prompt\nanother\n"))
    command = [
        "generate",
        "--base",
        str(folders["base"]),
        "--max-tokens",
        "4",
        "--num-blocks",
        "50",
    ]
    assert main(command) == EXIT_OK
    out = capsys.readouterr().out
    assert "one prompt" in out
    assert "another" in out
    assert out.count("length") + out.count("stop") == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-tokens", "0", "--prompt", "x"], EXIT_USAGE, "max_tokens must be"),
        (["--max-tokens", "3", "--prompt", "x", "--method", "eft"], EXIT_USAGE, "needs tuned"),
        (["--max-tokens", "300", "--prompt", "x"], EXIT_FAILED, "positions of base"),
        (["--max-tokens", "3", "--file", "absent.txt"], EXIT_USAGE, "absent.txt"),
        (["--max-tokens", "3", "--prompt", "x", "--device", "tpu"], EXIT_USAGE, "device must be"),
    ],
)
def test_refusals(folders, capsys, options, code, message) -> None:
    command = ["generate", "--base", str(folders["base"]), "--num-blocks", "50", *options]
    assert main(command) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_json_lines_from_stdin(folders, capsys, monkeypatch) -> None:
    lines = ['{"prompt": "one"}', '"two\u2028three"', '{"prompt": [1, 2]}', ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    command = ["generate", "--base", str(folders["base"]), "--max-tokens", "3", "--num-blocks"]
    assert main([*command, "50", "--input-format", "jsonl", "--format", "jsonl"]) == EXIT_OK
    got = [record["prompt"] for record in _records(capsys)]
    assert got == ["one", "two\u2028three", None]


def test_bad_lines_are_named(folders, capsys, tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\n{"text": "y"}\n', "utf-8")
    command = ["generate", "--base", str(folders["base"]), "--max-tokens", "3", "--file", str(file)]
    assert main(command) == EXIT_USAGE
    assert "bad.jsonl:2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ["a", "b"]}', "token ids"),
        ('{"prompt": {"base": 5}}', "base must be"),
        ('{"prompt": "x", "seed": "a"}', "'seed'"),
        ('{"prompt": "x", "seed": true}', "'seed'"),
        ('{"prompt": "x", "sede": 3}', "'sede' in a line (is 'seed' meant?)"),
        ('{"prompt": "x", "max_tokens": 2}', "'max_tokens'"),
    ],
)
def test_bad_fields_are_named_before_a_model_is_loaded(
    folders, capsys, tmp_path, monkeypatch, line: str, message: str
) -> None:
    def load(*_args, **_kwargs) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(Engine, "from_pretrained", load)
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x", "seed": 1}\n' + line + "\n", "utf-8")
    command = ["generate", "--base", str(folders["base"]), "--max-tokens", "3", "--file", str(file)]
    assert main(command) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "bad.jsonl:2" in error
    assert message in error


def test_a_refused_line_leaves_the_others(folders, capsys, tmp_path) -> None:
    """Those draw what they draw in a file of good lines; a byte order mark is no fault."""
    chat = [{"role": "user", "content": "x"}]
    wrong = {1: "x" * 2000, 2: "", 4: chat, 5: [5000], 6: "\ud800"}
    good = [{"prompt": f"prompt {i}", "id": i} for i in range(8)]
    mixed = [{**line, "prompt": wrong.get(i, line["prompt"])} for i, line in enumerate(good)]
    found = []
    for lines, code in ((good, EXIT_OK), (mixed, EXIT_FAILED)):
        text = "\n".join(map(json.dumps, lines))
        file = tmp_path / "prompts.jsonl"
        file.write_text(text, "utf-8-sig")
        command = ["generate", "--base", str(folders["base"]), "--file", str(file), "--seed", "3"]
        options = ["--max-tokens", "6", "--num-blocks", "99", "--format", "jsonl"]
        assert main([*command, *options]) == code
        found.append(_records(capsys))
    assert [line["id"] for line in found[1]] == list(range(8))
    for i, (alone, line) in enumerate(zip(*found, strict=True)):
        if i in wrong:
            assert (line["prompt"], line["line"]) == (wrong[i], i + 1)
            assert "Error: " in line["error"]
        else:
            assert line["outputs"][0]["token_ids"] == alone["outputs"][0]["token_ids"]


def test_best_of_n_and_model_kwargs(folders, capsys) -> None:
    command = ["generate", *_models(folders), "--prompt", "x", "--max-tokens", "4", "--seed", "2"]
    options = ["--method", "best_of_n", "--num-blocks", "99", "--format", "jsonl"]
    kwargs = ["--model-kwargs", '{"tuned": {"attn_implementation": "eager"}}']
    assert main([*command, *options, *kwargs]) == EXIT_OK
    (line,) = _records(capsys)
    params = SearchParams.best_of_n(16, max_tokens=4, seed=2)
    config = EngineConfig(num_blocks=99)
    with Engine.from_pretrained(*folders.values(), config=config) as engine:
        (expected,) = engine.generate("x", params)
    assert line["outputs"][0]["token_ids"] == expected.outputs[0].token_ids
    with pytest.raises(SystemExit) as caught:
        main([*command, "--model-kwargs", "[]"])
    assert caught.value.code == EXIT_USAGE
    assert "JSON object" in capsys.readouterr().err


def test_unknown_options_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--base", "b", "--max-tokens", "3", "--beams", "4"])
    assert caught.value.code == EXIT_USAGE


def test_help_explains_every_parameter(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--beam-width", "--dedup-finished", "--max-burst-steps", "--kv-memory-fraction"):
        assert option in text
    assert "candidates that survive a selection" in text


def test_info(capsys) -> None:
    assert main(["info"]) == EXIT_OK
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"ivg_fast", "torch", "transformers", "devices"} <= set(map(str.strip, rows))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    is_built = rows["CUDA kernels"].startswith("built for sm_80")
    assert is_built == _C.cuda_built
    assert ("copies of blocks by cuda" in rows["GPU"]) == is_built


def _records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def _write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def test_prompts_of_every_form_with_seeds(folders, capsys, tmp_path) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    prompts = ["the cat", messages, [1, 2, 3], {"raw": "the cat", "tuned": [4, 5]}]
    lines = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
    file = _write(tmp_path / "prompts.jsonl", lines)
    options = shlex.split("--method eft --max-tokens 5 --format jsonl --logprobs --num-blocks 99")
    command = ["generate", *_models(folders)[:6], "--file", file, "--template", "<{raw}>"]
    assert main([*command, *options]) == EXIT_OK
    got = _records(capsys)
    paths = [folders[role] for role in ("base", "tuned", "untuned")]
    templates = dict.fromkeys(("base", "tuned", "untuned"), Template("<{raw}>"))
    config = EngineConfig(num_blocks=99)
    with Engine.from_pretrained(*paths, templates=templates, config=config) as engine:
        inputs = [*prompts[:3], Prompt(raw="the cat", tuned=[4, 5])]
        params = SearchParams.eft(max_tokens=5, logprobs=True)
        expected = engine.generate(inputs, params, seeds=range(4))
    assert got == [json.loads(json.dumps(dataclasses.asdict(o))) for o in expected]
    assert got[0]["prompt"] == "<the cat>"


def test_a_failing_request_leaves_the_others(folders, capsys, tmp_path, monkeypatch) -> None:
    (tmp_path / "scorers_of_mine.py").write_text(
        "def picky(inputs):\n    return [1 / (item.prompt != 'bad') for item in inputs]\n",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--base", str(folders["base"]), "--num-blocks", "99", "--method", "cbs"]
    command += ["--max-tokens", "4", "--scorer", "scorers_of_mine:picky", "--format", "jsonl"]
    prompts = [word for text in ("good", "bad", "fine", "bad") for word in ("--prompt", text)]
    assert main([*command, *prompts]) == EXIT_FAILED
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["good", "bad", "fine", "bad"]
    assert lines[0]["outputs"][0]["score"] == lines[2]["outputs"][0]["score"] == 1.0
    for line in (lines[1], lines[3]):
        assert "ScorerError: scorer picky raised ZeroDivisionError" in line["error"]
    assert captured.err.count("'bad'") == 2


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_lines_are_written_as_requests_end(folders, capsys, monkeypatch, form: str) -> None:
    """Those of four prompts that run one after another, for want of blocks."""
    written: list[str] = []
    num_written = []
    run_step = RequestLoop.run_step

    def counting(loop):
        written.append(capsys.readouterr().out)
        num_written.append("".join(written).count("prompt "))
        return run_step(loop)

    monkeypatch.setattr(RequestLoop, "run_step", counting)
    command = ["generate", "--base", str(folders["base"]), "--num-blocks", "2", "--max-tokens", "9"]
    prompts = [word for i in range(4) for word in ("--prompt", f"prompt {i}")]
    assert main([*command, *prompts, "--format", form, "--ignore-eos"]) == EXIT_OK
    written.append(capsys.readouterr().out)
    assert {1, 2, 3} <= set(num_written)
    assert "".join(written).count("prompt ") == 4


def test_lines_stand_in_the_order_of_prompts(capsys) -> None:
    lines = Lines([Ask(f"x:{i}", text, text) for i, text in enumerate("abcd", 1)], "jsonl")
    seen = []
    for index in (2, 1, 0, 3):
        lines.ended(index, ValueError(f"number {index}"))
        seen.append([json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()])
    assert seen == [[], [], ["a", "b", "c"], ["d"]]


@pytest.mark.parametrize("missing", ["base", "tuned", "untuned", "value"])
@pytest.mark.parametrize("name", ["no/such/folder", "no-such-model", "./here"])
def test_a_missing_model_is_named_before_any_is_loaded(
    folders, capsys, monkeypatch, missing: str, name: str
) -> None:
    def load(*_args, **_kwargs) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("ivg_fast.models.roles.load_model", load)
    monkeypatch.setattr("ivg_fast.models.roles.load_tokenizer", load)
    paths = {**folders, missing: name}
    command = ["generate", *_models(paths), "--max-tokens", "3", "--prompt", "x"]
    assert main(command) == EXIT_USAGE
    message = capsys.readouterr().err
    assert message.startswith(f"ivg-fast: {missing} must be a folder")
    assert repr(name) in message
    assert "huggingface" not in message.lower()
    with pytest.raises(InvalidParameterError, match=f"^{missing} must be a folder"):
        Engine.from_pretrained(*paths.values())


def test_a_folder_without_a_model(folders, tmp_path) -> None:
    with pytest.raises(InvalidParameterError, match=r"tuned must be a model: no config\.json"):
        Engine.from_pretrained(folders["base"], tmp_path, folders["untuned"])
    with pytest.raises(InvalidParameterError, match="untuned must be given too"):
        Engine.from_pretrained("no-such-model", folders["tuned"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x"], "max_tokens must be given"),
        (["--max-tokens", "3", "--prompt", "x", "--file", "y"], "must stand without --file"),
        (
            ["--max-tokens", "3", "--prompt", "x", "--template", "alpaca"],
            "template must have {raw}",
        ),
        (["--max-tokens", "3", "--prompt", "x", "--scorer", "no:where"], "scorer must be one of"),
        (
            ["--max-tokens", "3", "--prompt", "x", "--scorer", "math:pi"],
            "scorer must name a callab",
        ),
        (["--max-tokens", "3", "--prompt", "x", "--scorer", "explicit"], "needs value (--value)"),
        (["--preset", "imdb", "--prompt", "x"], "tuned must be a folder or the name of a"),
        (["--preset", "tulu", "--max-tokens", "0", "--prompt", "x"], "max_tokens must be"),
    ],
)
def test_wrong_questions(folders, capsys, options, message) -> None:
    assert main(["generate", "--base", str(folders["base"]), *options]) == EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_preset_with_models_of_ones_own(folders, capsys) -> None:
    command = ["generate", *_models(folders), "--preset", "imdb", "--num-blocks", "300"]
    options = ["--max-tokens", "7", "--format", "jsonl", "--no-ignore-eos", "--seed", "5"]
    assert main([*command, *options, "--prompt", "good"]) == EXIT_OK
    (line,) = _records(capsys)
    assert line["prompt"] == "Here is a movie review from imdb: good"
    assert line["stats"]["num_selections"] == 2
    command = ["generate", *_models(folders), "--preset", "tulu", "--num-blocks", "300"]
    assert main([*command, "--template", "raw", "--prompt", "x" * 3000]) == EXIT_FAILED
    assert "must be shorter than the preset's 2048 tokens" in capsys.readouterr().err


def test_score(folders, capsys, tmp_path, monkeypatch) -> None:
    records = [
        {"prompt": "the cat", "response": " sat", "id": 7},
        {"prompt": [1, 2, 3], "response": [4, 5]},
        {"prompt": {"raw": "a", "tuned": "b"}, "response": "xyz", "ends_text": True},
    ]
    file = _write(tmp_path / "responses.jsonl", records)
    pair = _models(folders)[2:6]
    value = ["--value", str(folders["value"]), "--base", str(folders["base"])]
    (tmp_path / "scorers_of_mine.py").write_text(
        "def length(inputs):\n    return [len(item.response) for item in inputs]\n", "utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "scorers_of_mine", raising=False)
    prompts = ["the cat", [1, 2, 3], Prompt(raw="a", tuned="b")]
    responses = [record["response"] for record in records]
    paths = [None, folders["tuned"], folders["untuned"], folders["value"]]
    with ResponseScorer.from_pretrained(*paths) as scorer:
        for options, kind in ((pair, "implicit"), (value, "explicit")):
            assert main(["score", *options, "--file", file]) == EXIT_OK
            got = _records(capsys)
            wanted = scorer.score(prompts, responses, kind, ends_text=[False, False, True])
            assert [line.pop("score") for line in got] == pytest.approx(wanted, abs=1e-6)
            assert got == records, "a line is written back as it came"
    own = ["--scorer", "scorers_of_mine:length"]
    assert main(["score", *own, "--base", str(folders["base"]), "--file", file]) == EXIT_OK
    assert [line["score"] for line in _records(capsys)][::2] == [4.0, 3.0]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(records[0]) + "\n"))
    assert main(["score", *own]) == EXIT_OK
    assert _records(capsys) == [{**records[0], "score": 4.0}]


def test_score_goes_on_past_what_cannot_be_scored(folders, capsys, tmp_path) -> None:
    lines = [{"prompt": "x", "response": r} for r in ("ok", "", [5000], "y" * 400, "fine")]
    lines.insert(1, {"prompt": [], "response": "ok"})
    file = _write(tmp_path / "responses.jsonl", lines)
    models = [*_models(folders)[:2], *_models(folders)[6:]]
    assert main(["score", *models, "--file", file]) == EXIT_FAILED
    captured = capsys.readouterr()
    got = [json.loads(line) for line in captured.out.splitlines()]
    assert ["score" in line for line in got] == [True, False, False, False, False, True]
    assert "responses must have a token" in got[2]["error"]
    assert "CapacityError" in got[4]["error"]
    assert "must have a token for value" in got[1]["error"]
    assert got[1]["line"] == 2
    assert f"{file}:4" in captured.err


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        ([], '{"prompt": "x", "response": "y"}', "a model must be given"),
        (["--tuned"], '{"prompt": "x", "response": "y"}', "untuned"),
        (["--tuned", "--untuned", "--value"], "{}", "which of both is meant"),
        (["--value", "--scorer", "none"], "{}", "must be one that scores"),
        (["--value", "--scorer", "implicit"], '{"prompt": "x", "response": ""}', "needs tuned and"),
        (["--value"], '{"prompt": "x"}', "'response'"),
        (["--value"], '{"prompt": 3, "response": "y"}', "'prompt'"),
        (["--value"], '{"prompt": {"role": "x"}, "response": "y"}', "not role"),
        (["--value"], '{"prompt": "x", "response": "y", "ends_text": 1}', "'ends_text'"),
        (["--value"], '{"prompt": "x", "response": "y", "end_text": true}', "is 'ends_text' meant"),
        (["--value"], '{"prompt": "x", "response": ["y"]}', "'response'"),
        (["--value"], '{"prompt": ["a", "b"], "response": "y"}', "standard input:1"),
        (["--value"], "{", "must be JSON"),
        (["--value"], "", "there is none"),
    ],
)
def test_score_refuses(folders, capsys, monkeypatch, options, line, message) -> None:
    words = []
    for option in options:
        words.append(option)
        if option[2:] in folders:
            words.append(str(folders[option[2:]]))
    monkeypatch.setattr("sys.stdin", io.StringIO(line))
    assert main(["score", *words]) == EXIT_USAGE
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize("cls", [SearchParams, EngineConfig])
def test_every_field_is_an_option(cls: type, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(cls):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("command", [["generate"], ["score"], []])
def test_help_has_examples_that_parse(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    if command:
        lines = text[text.index("examples:") :].replace("\\\n", " ").splitlines()
        found = [line for line in lines if "ivg-fast " in line]
        examples = [line[line.index("ivg-fast ") :] for line in found if line.startswith("    ")]
        assert len(examples) > 2
        for example in examples:
            build_parser().parse_args(shlex.split(example.split(" > ")[0])[1:])


def test_serve_places_models_and_score_does_not(capsys) -> None:
    arguments = build_parser().parse_args(["serve", "--base", "b", "--device", "cuda"])
    assert arguments.device == "cuda"
    with pytest.raises(SystemExit):
        build_parser().parse_args(["score", "--value", "v", "--device", "cuda"])
    assert "--device" in capsys.readouterr().err
