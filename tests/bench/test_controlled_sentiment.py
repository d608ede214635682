# SPDX-License-Identifier: Apache-2.0
"""The whole experiment by its command line: the paper's preset with tiny stand-ins for its models.

What it reports is computed again from the responses it kept, with stock transformers.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper_standins import save_standins
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from bench.experiments import methods
from bench.experiments.controlled_sentiment import family_of, main, parser, settings_of
from bench.experiments.methods import GUIDED
from ivg_fast import Engine
from ivg_fast.training.data import test_prompts

pytest.importorskip("vaderSentiment", reason="needs the extra `train`")
TEMPLATE = "Here is a movie review from imdb: "
METHODS = ["base", "best_of_16", "eft", "args", "cbs_implicit", "cbs_explicit", "ivg"]
ROLES = ("base", "tuned", "untuned", "value")


@pytest.fixture(scope="module", autouse=True)
def _short_sweep() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "SWEPT", {"beam_width": (1, 4), "chunk_length": (5, 50)})
        yield


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_standins(tmp_path_factory.mktemp("standins"))


def _arguments(standins: dict[str, str], out: Path, *more: str) -> list[str]:
    models = [word for name in (*ROLES, "gold") for word in (f"--{name}", standins[name])]
    sizes = "--num-prompts 3 --num-dev-prompts 2 --num-sweep-prompts 1 --seeds 0 1"
    weights = "--weights 0.25 0.5 --wide-weights 1"
    words = ["--out", str(out), "--preset", "paper", "--paper-base", "gpt2", *models]
    return [*words, *sizes.split(), *weights.split(), "--judge", standins["untuned"], *more]


@pytest.fixture(scope="module")
def out(standins: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main(_arguments(standins, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def responses(out: Path, summary: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Test records by method and seed, from the cells with the chosen weight."""
    found = {}
    for path in (out / "cells").glob("*-test-*.jsonl"):
        config, *batches = [json.loads(line) for line in path.read_text().splitlines()]
        name = path.name.split("-")[0]
        found[name, config["seed"]] = [r for batch in batches for r in batch["records"]]
    assert len(found) == 2 * len(summary["methods"])
    return found


def test_every_method_is_reported(out: Path, summary: dict[str, Any]) -> None:
    assert list(summary["methods"])[:7] == METHODS
    report = (out / "report.md").read_text()
    assert "models: paper, gpt2 with another base, tuned, untuned, value, gold." in report
    models = summary["settings"]["models"]
    assert list(models) == list(ROLES)
    assert len({*models.values()}) == 4
    assert not any("/" in each for each in models.values())  # contents, no folders
    for name in ("best of 16", "EFT", "ARGS-style", "CBS (implicit)", "CBS (explicit)", "| IVG |"):
        assert name in report
    for plot in ("reward_kl.png", "reward_time.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in samples if s["method"] == "ivg"] == test_prompts(3)
    assert len(summary["weight_sweep"]) == 1 + 3 * len(GUIDED)
    assert len(summary["search_sweep"]) == 2 * 3
    assert ("IVG's gold reward minus EFT's" in report) == bool(summary["ivg_minus_eft_at_equal_kl"])
    claims = summary["order"]
    assert set(claims) >= {"eft - base", "cbs_implicit - base", "ivg - eft", "ivg - cbs_explicit"}
    for claim, holds in claims.items():  # random models: whatever came out is what is said
        assert holds == (summary["differences"][claim]["interval_95"][0] > 0)


def test_gold_reward_is_the_classifiers(
    out: Path, standins: dict[str, str], summary: dict[str, Any], responses: Any
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(standins["gold"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(standins["gold"])

    def gold(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
        with torch.inference_mode():
            negative, positive = model(ids).logits[0].tolist()
        return positive - negative

    rows = list(csv.DictReader((out / "per_prompt.csv").open()))
    assert len(rows) == len(summary["methods"]) * 2 * 3
    for row in rows:
        record = responses[row["method"], int(row["seed"])][int(row["prompt"])]
        wanted = gold(record["prompt"] + record["response"])
        assert float(row["gold"]) == pytest.approx(wanted, abs=1e-3)
    own = [float(row["gold"]) for row in rows if row["method"] == "ivg"]
    assert summary["methods"]["ivg"]["gold"] == pytest.approx(np.mean(own), abs=1e-3)
    assert np.abs(own).max() > 0.05  # else any reward would pass


def test_distance_and_perplexity(
    standins: dict[str, str], summary: dict[str, Any], responses: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(standins["base"]).eval()
    judge = AutoModelForCausalLM.from_pretrained(standins["untuned"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(standins["base"])

    def logprobs(model: Any, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0].double() / temperature
        table = logits.log_softmax(-1)[len(prompt) - 1 :]
        return [float(table[i, token]) for i, token in enumerate(ids)]

    for name in METHODS:
        figures = summary["methods"][name]
        records = [record for seed in (0, 1) for record in responses[name, seed]]
        ratio, nll, judged = [], [], []
        for record in records:
            prompt = tokenizer(TEMPLATE + record["prompt"]).input_ids
            at = logprobs(base, prompt, record["token_ids"], 0.7)
            assert len(at) == 50
            ratio.append(record["logprob"] - sum(at))
            nll += logprobs(base, prompt, record["token_ids"], 1.0)
        for record in responses[name, 0]:
            prompt = tokenizer(record["prompt"]).input_ids
            text = tokenizer(record["prompt"] + record["response"]).input_ids
            judged += logprobs(judge, prompt, text[len(prompt) :], 1.0)
        assert figures["kl"]["log_ratio"] == pytest.approx(np.mean(ratio), abs=2e-3)
        assert figures["perplexity_base"] == pytest.approx(math.exp(-np.mean(nll)), rel=1e-4)
        assert figures["perplexity_judge"] == pytest.approx(math.exp(-np.mean(judged)), rel=1e-4)
        is_tilted = name in GUIDED
        assert (abs(figures["kl"]["log_ratio"]) > 0.1) == is_tilted
        assert figures["kl"]["is_upper_bound"] == (name in (*METHODS[4:], "best_of_16"))


def test_only_the_base_reads_the_template(
    standins: dict[str, str], summary: dict[str, Any], responses: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(standins["base"])
    raw = [len(tokenizer(prompt).input_ids) for prompt in test_prompts(3)]
    long = [len(tokenizer(TEMPLATE + prompt).input_ids) for prompt in test_prompts(3)]
    assert min(long) > max(raw)
    forwarded = summary["methods"]["eft"]["tokens_forwarded"]
    assert forwarded["base"] == pytest.approx(49 + np.mean(long))
    assert forwarded["tuned"] == forwarded["untuned"] == pytest.approx(49 + np.mean(raw))
    assert forwarded["value"] == 0
    for record in responses["ivg", 0]:
        assert tokenizer.decode(record["prompt_ids"]) == TEMPLATE + record["prompt"]


def test_again_nothing_runs(
    out: Path, standins: dict[str, str], summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    generate = Engine.generate

    def counted(self: Engine, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        decoded.extend(prompts)
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", counted)
    assert main(_arguments(standins, out)) == 0
    assert decoded == []
    again = json.loads((out / "summary.json").read_text())
    assert again == summary
    # A further seed: its own cells and no others. One prompt less: none.
    more = ["--no-sweeps", "--seeds", "0", "1", "2", "--num-prompts", "2"]
    assert main(_arguments(standins, out, *more)) == 0
    assert len(decoded) == 2 * len(summary["methods"])
    wider = json.loads((out / "summary.json").read_text())["methods"]["eft"]["gold_by_seed"]
    assert len(wider) == 3


def test_times_of_their_own(out: Path, standins: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    more = ["--no-sweeps", "--time", "--num-timed-prompts", "1"]
    assert main(_arguments(standins, tmp_path, *more)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["timing"]) == set(summary["methods"])
    assert "weight_sweep" not in summary
    for row in summary["timing"].values():
        assert row["seconds"] == sorted(row["rounds"])[1]
    assert "Times are of a run of their own" in (tmp_path / "report.md").read_text()
    # They are of that many prompts and threads, and of no others.
    for changed in (["--num-timed-prompts", "2"], ["--num-timed-prompts", "1", "--threads", "2"]):
        assert main(_arguments(standins, tmp_path, "--no-sweeps", *changed)) == 0
        assert "timing" not in json.loads((tmp_path / "summary.json").read_text())
    assert main(_arguments(standins, tmp_path, *more[:1], *more[2:])) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["timing"] == summary["timing"]


def test_settings_of_the_command_line() -> None:
    args = parser().parse_args(["--out", "x", "--quick", "--num-prompts", "5"])
    settings = settings_of(args)
    assert (settings.num_prompts, settings.seeds, settings.wide_weights) == (5, (0,), ())
    full = settings_of(parser().parse_args(["--out", "x", "--judge", "a/b.gguf"]))
    assert (full.num_prompts, full.seeds, full.judge_name) == (200, (0, 1, 2), "b")
    assert full.weights == (0.25, 0.5, 0.75, 1.0)
    paper = family_of(parser().parse_args(["--out", "x", "--preset", "paper"]))
    assert paper.models["value"] == "chadlzx/gpt2-imdb-token-rm"
    assert (paper.models["base"], paper.gold) == ("gpt2-large", "lvwerra/distilbert-imdb")


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "o"), "--num-prompts", "1000000"]) == 2
    assert "num_prompts must be at most" in capsys.readouterr().err
