# SPDX-License-Identifier: Apache-2.0
"""The summarization experiment by its command line: the paper's preset and a recipe's folder.

Tiny stand-ins of the same architectures; figures are computed again from the responses it kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper_standins import save_classifier, save_standins
from summary_standins import save_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bench.experiments import summarization
from bench.experiments.summarization import TWO_SHOT, family_of, main, parser
from bench.experiments.tasks import SUMMARIZATION
from ivg_fast.training.records import write_jsonl
from ivg_fast.training.summary_reward import SentenceEncoder, SummaryReward

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the extra `train`")
METHODS = ["base", "best_of_16", "eft", "args", "cbs_implicit", "cbs_explicit", "ivg"]
ROLES = ("base", "tuned", "untuned", "value")
SIZES = "--num-prompts 3 --num-dev-prompts 2 --seeds 0 1 --weights 0.5 --no-sweeps --wide-weights"
PLOT = "SUBREDDIT: r/relationships\nPOST: my film was great and bad and the plot is number"


@pytest.fixture(scope="module", autouse=True)
def _short() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUMMARIZATION.sampling, "max_tokens", 12)  # type: ignore[misc]
        yield


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The four models with room for two posts, and a reward model of one label."""
    folder = tmp_path_factory.mktemp("standins")
    found = save_standins(folder, num_positions=1536)
    save_classifier(folder / "reward", num_labels=1)
    rows = [
        {"split": split, "prompt": f"{PLOT} {split} {i}\n", "gist": f"great film {i}"}
        for split in ("dev", "test")
        for i in range(4)
    ]
    write_jsonl(folder / "prompts.jsonl", rows)
    return {**found, "gold": str(folder / "reward"), "folder": str(folder)}


def _records(out: Path, method: str) -> list[dict[str, Any]]:
    found = []
    summary = json.loads((out / "summary.json").read_text())
    for path in (out / "cells").glob(f"{method}-test-*.jsonl"):
        config, *batches = map(json.loads, path.read_text().splitlines())
        if config["seed"] == 0:
            found += [record for batch in batches for record in batch["records"]]
    assert len(found) == 3, summary["chosen_weights"]
    return found


@pytest.fixture(scope="module")
def paper_out(standins: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    models = [word for name in (*ROLES, "gold") for word in (f"--{name}", standins[name])]
    prompts = ["--prompts", f"{standins['folder']}/prompts.jsonl"]
    arguments = ["--out", str(out), "--preset", "paper", "--paper-base", "gpt2"]
    assert main([*arguments, *models, *prompts, *SIZES.split()]) == 0
    return out


def test_paper_preset(paper_out: Path, standins: dict[str, str]) -> None:
    summary = json.loads((paper_out / "summary.json").read_text())
    assert list(summary["methods"]) == METHODS
    records = _records(paper_out, "ivg")
    tokenizer = AutoTokenizer.from_pretrained(standins["base"])
    for record in records:
        assert tokenizer.decode(record["prompt_ids"]) == TWO_SHOT + record["prompt"] + "\nTL;DR:"
        assert "\n" not in record["response"]
        assert len(record["token_ids"]) <= 12
    # The guides read the post alone, with their own cue.
    forwarded = summary["methods"]["eft"]["tokens_forwarded"]
    own = [len(tokenizer(f"{PLOT} test {i}\nTL;DR: ").input_ids) for i in range(3)]
    new = [len(r["token_ids"]) - 1 for seed in (0,) for r in _records(paper_out, "eft")]
    assert forwarded["tuned"] == forwarded["untuned"]
    assert abs(forwarded["tuned"] - np.mean(own) - np.mean(new)) < 12
    assert forwarded["base"] - forwarded["tuned"] > len(tokenizer(TWO_SHOT).input_ids) - 12


def test_reward_and_rouge_again(paper_out: Path, standins: dict[str, str]) -> None:
    judge = AutoModelForSequenceClassification.from_pretrained(standins["gold"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(standins["gold"])
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    summary = json.loads((paper_out / "summary.json").read_text())
    for name in ("base", "ivg"):
        golds, rouges = [], []
        for i, record in enumerate(_records(paper_out, name)):
            text = record["prompt"] + "TL;DR: " + record["response"].strip()
            with torch.inference_mode():
                inputs = tokenizer(text, return_tensors="pt", truncation=True)
                inputs.pop("token_type_ids", None)
                golds.append(float(judge(**inputs).logits[0, 0]))
            rouges.append(scorer.score(f"great film {i}", record["response"])["rouge1"].fmeasure)
        row = summary["methods"][name]
        assert row["gold_by_seed"][0] == pytest.approx(np.mean(golds), abs=1e-4)
        csv = (paper_out / "per_prompt.csv").read_text().splitlines()
        assert csv[0] == "method,seed,prompt,gold,rouge"
        own = [float(line.split(",")[4]) for line in csv if line.startswith(f"{name},0,")]
        assert own == pytest.approx(rouges, abs=1e-4)


def test_the_report_has_samples_and_the_second_judge(paper_out: Path) -> None:
    text = (paper_out / "report.md").read_text()
    assert text.startswith("# Summarization\n")
    assert "## Differences in rouge" in text
    samples = text.split("## Samples")[1]
    assert samples.count("- reference: great film") == 3
    for record in _records(paper_out, "ivg"):
        assert " ".join(record["response"].split()) in samples
    assert "TL;DR" not in samples.split("- reference")[0].split(">")[0]


def test_a_recipes_folder(standins: dict[str, str], tmp_path: Path) -> None:
    encoder = str(save_encoder(tmp_path / "encoder"))
    arguments = ["--out", str(tmp_path / "out"), "--family", standins["folder"], "--gold", encoder]
    assert main([*arguments, *SIZES.split()]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    reward = SummaryReward(SentenceEncoder(encoder))
    for name in ("base", "cbs_explicit"):
        records = _records(tmp_path / "out", name)
        golds = reward.score_pairs([r["prompt"] for r in records], [r["response"] for r in records])
        assert summary["methods"][name]["gold_by_seed"][0] == pytest.approx(np.mean(golds))
    tokenizer = AutoTokenizer.from_pretrained(standins["base"])
    for record in _records(tmp_path / "out", "ivg"):
        assert tokenizer.decode(record["prompt_ids"]) == record["prompt"] + "\nTL;DR:"
    assert standins["folder"] not in (tmp_path / "out" / "summary.json").read_text()


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "summary_family" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--family", str(tmp_path)]) == 2
    assert "must hold base" in capsys.readouterr().err
    paper = ["--out", str(tmp_path), "--preset", "paper"]
    assert main(paper) == 2
    assert "prompts" in capsys.readouterr().err
    posts = tmp_path / "posts.jsonl"
    posts.write_text(
        '{"split": "dev", "prompt": "a\\n"}\n{"split": "test", "prompt": "last words"}'
    )
    assert main([*paper, "--prompts", str(posts)]) == 2
    assert "'...last words'" in capsys.readouterr().err


def test_the_papers_models_and_settings() -> None:
    chosen = family_of(parser().parse_args(["--out", "x", "--preset", "paper"]))
    assert chosen.models["base"] == "gpt2-large"
    assert chosen.models["value"] == "chadlzx/gpt2-summarize-token-rm"
    assert chosen.gold == summarization.PAPER_GOLD == "chadlzx/golden_rm_summarize"
    assert TWO_SHOT.count("TL;DR:") == 2
    assert {role: chosen.templates[role] for role in ROLES[1:]} == dict.fromkeys(ROLES[1:], "tldr")
    assert SUMMARIZATION.sampling["stop"] == "\n"
    assert SUMMARIZATION.sampling["temperature"] == 0.7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--num-prompts 9", "num_prompts must be at most 4, the test prompts"),
        ("--num-dev-prompts 9", "num_dev_prompts must be at most 4, the dev prompts"),
        ("--time --num-timed-prompts 9", "num_timed_prompts must be at most 4, the test prompts"),
        ("--num-prompts 0", "num_prompts must be at least 1"),
        ("--device abacus", "device must be"),
        ("--paper-base gpt2-xl", "paper_base must be left out without --preset paper"),
        ("--judge-name somebody", "judge_name must be left out without --judge"),
        ("--num-judged 3", "num_judged must be left out without --judge"),
        ("--preset paper", "family must be left out of --preset paper"),
        ("--prompts nowhere.jsonl", "no such file: nowhere.jsonl"),
    ],
)
def test_what_no_run_can_do_is_said_in_a_line_before_it_begins(
    standins: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str,
    message: str,
) -> None:  # fmt: skip
    encoder = str(save_encoder(tmp_path / "encoder"))
    arguments = ["--out", str(tmp_path / "o"), "--family", standins["folder"], "--gold", encoder]
    assert main([*arguments, *SIZES.split(), *given.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "o").glob("cells/*"))


def test_sweeps_need_their_prompts_too(
    standins: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "o"), "--family", standins["folder"], "--gold", "x"]
    sizes = SIZES.replace("--no-sweeps", "--num-sweep-prompts 5")
    assert main([*arguments, *sizes.split()]) == 2
    assert "num_sweep_prompts must be at most 4, the dev prompts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base", "value", "gold", "judge"])
def test_a_model_that_is_not_there_is_named(
    standins: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = str(save_encoder(tmp_path / "encoder"))
    arguments = ["--out", str(tmp_path / "o"), "--family", standins["folder"], "--gold", encoder]
    absent = str(tmp_path / "absent")
    capsys.readouterr()
    assert main([*arguments, *SIZES.split(), f"--{name}", absent]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name} must be")
    assert error.count("\n") == 1
    assert not list((tmp_path / "o").glob("cells/*"))


def test_a_gold_that_cannot_reward_is_refused_before_decoding(
    standins: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "o"), "--family", standins["folder"]]
    (tmp_path / "gold.npz").write_bytes(b"weights of another reward")
    assert main([*arguments, *SIZES.split(), "--gold", str(tmp_path / "gold.npz")]) == 2
    assert "gold must be a reward model or a folder of the sentence" in capsys.readouterr().err
    assert not list((tmp_path / "o").glob("cells/*"))
