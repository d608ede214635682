# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, reads and refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import _C, Engine, EngineConfig, SearchParams
from ivg_fast.cli import EXIT_FAILED, EXIT_OK, EXIT_USAGE, main


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
    file.write_text('{"prompt": "the cat"}\n\n{"prompt": "a dog", "other": 1}\n', "utf-8")
    options = "--method ivg --max-tokens 9 --chunk-length 3 --seed 7 --n 3 --stop Q --stop Z"
    arguments = ["generate", *_models(folders), "--file", str(file), *options.split()]
    assert main([*arguments, "--format", "jsonl", "--num-blocks", "200"]) == EXIT_OK
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    params = SearchParams.ivg(max_tokens=9, chunk_length=3, seed=7, n=3, stop=("Q", "Z"))
    paths = [folders[role] for role in ("base", "tuned", "untuned", "value")]
    with Engine.from_pretrained(*paths, config=EngineConfig(num_blocks=200)) as engine:
        expected = engine.generate(["the cat", "a dog"], params)
    assert [line["prompt"] for line in lines] == ["the cat", "a dog"]
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
    ],
)
def test_refusals(folders, capsys, options, code, message) -> None:
    command = ["generate", "--base", str(folders["base"]), "--num-blocks", "50", *options]
    assert main(command) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_bad_lines_are_named(folders, capsys, tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\n{"text": "y"}\n', "utf-8")
    command = ["generate", "--base", str(folders["base"]), "--max-tokens", "3", "--file", str(file)]
    assert main(command) == EXIT_USAGE
    assert "bad.jsonl:2" in capsys.readouterr().err


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
