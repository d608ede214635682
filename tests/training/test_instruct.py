# SPDX-License-Identifier: Apache-2.0
"""The recipe for instruction following at toy size, from a chat model to both value functions."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from ivg_fast.training import cli, instruct
from ivg_fast.training.records import read_jsonl
from ivg_fast.training.value_model import PrefixValueModel

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random chat model that often ends its responses."""
    folder = tmp_path_factory.mktemp("chat")
    model = tiny_model("llama", max_position_embeddings=512)
    model.lm_head.weight[-1] *= 2
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_from_nothing(chat_model, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("trl", reason="needs the extra `train`")
    # A random model hardly ever fulfils a constraint: it is rewarded for what it can do.
    reward = lambda _, text: float(sum(map(str.islower, text)))  # noqa: E731
    monkeypatch.setattr(instruct.constraints, "reward", reward)
    evaluation = tmp_path / "evaluation.jsonl"
    first = instruct.constraints.draw_prompts(1, 0)[0]["prompt"]
    evaluation.write_text(json.dumps({"prompt": first}) + "\n")
    arguments = ["instruct", "--tiny", "--model", str(chat_model), "--work", str(tmp_path / "w")]
    arguments += ["--disjoint-from", str(evaluation)]
    # Interrupted in the middle of a line behind the first batch, then taken up again.
    assert cli.main([*arguments, "--stages", "untuned,samples"]) == 0
    batches = tmp_path / "w" / "samples" / "batches.jsonl"
    lines = batches.read_text().splitlines(keepends=True)
    silent = json.loads(lines[0])
    # an end of text alone is a response too
    silent["responses"][0], silent["are_whole"][0] = "", True
    lines[0] = json.dumps(silent, ensure_ascii=False) + "\n"
    whole = "".join(lines)
    torn = '{"responses": ["Wré'.encode()[:-1]  # within a character
    batches.write_bytes("".join(lines[:8]).encode() + torn)
    (tmp_path / "w" / "samples" / "metrics.json").unlink()
    assert cli.main(arguments) == 0
    assert batches.read_text() == whole

    settings = json.loads((tmp_path / "w" / "settings.json").read_text())
    raws = [record["prompt"] for record in settings["prompts"]["samples"]]
    assert len(lines) == len(raws) == instruct.TINY.num_prompts
    assert first not in raws
    samples = read_jsonl(tmp_path / "w" / "samples" / "samples.jsonl", {"reward": float})
    assert samples[0]["prompt"] == f"<user>{raws[0]}\n<assistant>"
    assert (samples[0]["response"], samples[0]["response_is_whole"]) == ("", True)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["num_samples"] == len(samples) > 40
    assert 0 <= report["implicit_accuracy"] <= 1
    assert 0 <= report["value_accuracy"] <= 1

    untuned, tuned = (_weights(tmp_path / "w" / name) for name in ("untuned", "tuned"))
    assert any(not torch.equal(untuned[name], tuned[name]) for name in untuned)
    value = PrefixValueModel.load(tmp_path / "w" / "value")
    assert value.head == "scalar"
    assert value.shared.abs().sum() > 0
    trunk = value.backbone.state_dict()  # frozen: the engine may take tuned's own
    assert all(torch.equal(trunk[name], tuned[f"model.{name}"]) for name in trunk)

    # A second run has nothing left to do, and other settings are not mixed in.
    stamp = (tmp_path / "w" / "tuned" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert (tmp_path / "w" / "tuned" / "model.safetensors").stat().st_mtime_ns == stamp
    for changed, names in (
        (["--num-samples", "2"], "num_samples"),
        (["--seed", "1"], "prompts, seed"),
        (["--model", "other"], "model"),
    ):
        assert cli.main([*arguments, *changed]) == 2
        assert f"other settings ({names})" in capsys.readouterr().err
    evaluation.write_text(json.dumps({"prompt": raws[0]}) + "\n")
    assert cli.main(arguments) == 2
    assert "other settings (prompts)" in capsys.readouterr().err


def test_a_planted_prompt_of_the_evaluation_is_refused(monkeypatch, tmp_path) -> None:
    drawn = instruct.constraints.draw_prompts
    monkeypatch.setattr(instruct.constraints, "draw_prompts", lambda n, s, avoid: drawn(n, s))
    theirs = drawn(1, 0)[0]["prompt"]
    with pytest.raises(ValueError, match="must not be a prompt of the evaluation"):
        instruct.Instruct(tmp_path, instruct.TINY, 0, None, [theirs])


def test_a_model_without_a_chat_template_is_refused(tmp_path, capsys) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    arguments = ["instruct", "--tiny", "--model", str(tmp_path / "m"), "--work", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "chat template" in capsys.readouterr().err


def test_unknown_stage_is_refused(capsys) -> None:
    assert cli.main(["instruct", "--stages", "tune"]) == 2
    assert "'tune'" in capsys.readouterr().err
