# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast train`: the recipes from files to files, and errors as one line and status 2."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import cli
from ivg_fast.training.records import write_jsonl


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_recipes_from_files_to_files(model_folder, texts, tmp_path, capsys):
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text[:12]} for text in texts])
    out = {name: str(tmp_path / name) for name in ("sft", "preferences", "dpo", "value")}
    sft = ["sft", "--new", "1", "32", "--tokenizer", str(model_folder), "--output", out["sft"]]
    sft += ["--data", str(tmp_path / "texts.jsonl"), "--block-size", "32", "--batch-size", "4"]
    assert cli.main([*sft, "--eval-data", str(tmp_path / "texts.jsonl")]) == 0
    assert last_line(capsys)["eval_perplexity"] > 1

    sample = ["preferences", "--model", out["sft"], "--prompts", str(tmp_path / "prompts.jsonl")]
    sample += ["--reward", "builtins:hash_lengths", "--output", out["preferences"]]
    assert cli.main(sample) == 2
    assert "builtins:hash_lengths" in capsys.readouterr().err
    sample[sample.index("builtins:hash_lengths")] = f"{__name__}:count_e"
    assert cli.main([*sample, "--max-new-tokens", "6"]) == 0
    assert last_line(capsys)["num_samples"] > 0

    dpo = ["dpo", "--model", out["sft"], "--data", out["preferences"] + "/pairs.jsonl"]
    pytest.importorskip("trl", reason="needs the extra `train`")
    assert cli.main([*dpo, "--output", out["dpo"], "--epochs", "1", "--no-append-eos"]) == 0
    assert last_line(capsys)["num_steps"] >= 1
    value = ["value", "--model", out["sft"], "--data", out["preferences"] + "/samples.jsonl"]
    assert cli.main([*value, "--output", out["value"], "--epochs", "1", "--head", "scalar"]) == 0
    assert last_line(capsys)["num_steps"] >= 1


def count_e(texts):
    return [float(text.count("e")) for text in texts]


@pytest.mark.parametrize(
    ("recipe", "line", "message"),
    [
        ("sft", '{"txt": "a"}', "missing column 'prompt'"),
        ("sft", "", "is empty"),
        ("dpo", '{"prompt": "a", "chosen": "b"}', "missing column 'rejected'"),
        ("value", '{"prompt": "a", "response": "b", "reward": NaN}', "finite number, got nan"),
    ],
)
def test_bad_files_are_one_line_and_status_2(recipe, line, message, model_folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    arguments = ["--model", str(model_folder), "--data", str(tmp_path / "bad.jsonl")]
    assert cli.main([recipe, *arguments, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["sft", "preferences", "dpo", "value"])
def test_models_that_cannot_be_read(recipe, model_folder, tmp_path, capsys):
    record = {"prompt": "a", "response": " b", "chosen": " b", "rejected": " c", "reward": 1.0}
    write_jsonl(tmp_path / "data.jsonl", [record] * 4)
    data = "--prompts" if recipe == "preferences" else "--data"
    shutil.copytree(model_folder, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    shutil.copytree(model_folder, tmp_path / "lacking")
    weights = load_file(model_folder / "model.safetensors")
    weights.pop("transformer.ln_f.weight")
    save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    for name, message in (
        ("nowhere", f"must be a folder, or a hub name within reach.*{tmp_path}/nowhere"),
        ("bin", "model must be a folder, .*model.safetensors"),
        ("lacking", "model must hold every weight .no transformer.ln_f.weight"),
    ):
        arguments = ["--model", str(tmp_path / name), data, str(tmp_path / "data.jsonl")]
        assert cli.main([recipe, *arguments, "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(f"^error: .*{message}", error), error
    assert not (tmp_path / "run").exists()


def test_an_interruption_is_said_in_a_line(model_folder, tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "the film was great " * 20}] * 8)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.training_step", interrupted)
    words = ["sft", "--model", str(model_folder), "--data", str(tmp_path / "texts.jsonl")]
    words += ["--output", str(tmp_path / "run"), "--block-size", "32", "--batch-size", "4"]
    assert cli.main(words) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err


def test_sft_needs_a_model_or_a_size(tmp_path, capsys):
    assert cli.main(["sft", "--data", "x", "--output", str(tmp_path / "run")]) == 2
    assert "--new LAYERS HIDDEN" in capsys.readouterr().err


def test_named_rewards():
    with pytest.raises(InvalidParameterError, match="module:attribute"):
        cli.load_reward("no_such_module_here:f")
    with pytest.raises(InvalidParameterError, match="callable"):
        cli.load_reward("math:pi")
    assert cli.load_reward("builtins:len") is len
