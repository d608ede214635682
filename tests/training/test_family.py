# SPDX-License-Identifier: Apache-2.0
"""The whole family recipe at toy size, from a CSV to the files that ship."""

from __future__ import annotations

import csv
import json
import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivg_fast.training import cli, family, imdb
from ivg_fast.training.records import read_jsonl
from ivg_fast.training.rewards import GoldReward
from ivg_fast.training.value_model import PrefixValueModel

_COMMON = ["the film", "was", "a plot", "actors", "scene", "story", "really", "it", "and", "so"]
_MOODS = (["awful", "boring", "bad"], ["great", "lovely", "good"])


@pytest.fixture(scope="module")
def reviews_csv(tmp_path_factory):
    """Made-up reviews in the format of the real file."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("csv") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label", "source"])
        for _ in range(1500):
            label = rng.randrange(2)
            words = rng.choices(_COMMON + _MOODS[label], k=rng.randint(20, 80))
            writer.writerow([" ".join(words), label, "imdb"])
    return path


def test_family_from_nothing(reviews_csv, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the extra `train`")
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    arguments = ["--tiny", "--work", str(tmp_path / "work"), "--reviews-csv", str(reviews_csv)]
    arguments += ["--out", str(tmp_path / "out")]
    assert cli.main(["family", *arguments]) == 0
    out = tmp_path / "out"
    for name in ("base", "untuned", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert model.config.vocab_size == len(tokenizer) <= 512
        assert tokenizer.eos_token == "<|endoftext|>"
    assert PrefixValueModel.load(out / "value").head == "vocabulary"
    gold = GoldReward.load(out / "gold_reward.npz")
    assert gold.score(["great lovely good"])[0] > gold.score(["awful boring bad"])[0]
    report = json.loads((out / "metrics.json").read_text())
    assert report["gold_accuracy"] > 0.9
    assert report["untuned_perplexity"] < 100
    assert 0 <= report["value_accuracy"] <= 1
    assert 0 <= report["implicit_accuracy"] <= 1
    assert f"{report['value_accuracy']:.3f} of the same pairs" in (out / "README.md").read_text()

    prompts = read_jsonl(out / "prompts.jsonl", {"split": str, "prompt": str})
    test = {record["prompt"] for record in prompts if record["split"] == "test"}
    dev = {record["prompt"] for record in prompts if record["split"] == "dev"}
    assert (len(test), len(dev)) == (20, 10)
    assert not test & dev
    # No training text opens with a test prompt by being the review that it was cut from.
    reviews = imdb.load_reviews(reviews_csv)
    sources = {r.text for r in reviews if r.split == "test" and imdb.prompt_of(r.text) in test}
    assert not sources & {r.text for r in reviews if r.split == "train"}

    # a second run has nothing left to train
    stamp = (tmp_path / "work" / "base" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["family", *arguments]) == 0
    assert (tmp_path / "work" / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    # and is not taken for a family of another size or seed
    assert family.main([each for each in arguments if each != "--tiny"]) == 2
    assert "other settings (base_epochs, base_layers, block_size" in capsys.readouterr().err
    assert cli.main(["family", *arguments, "--seed", "1"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err


def test_unknown_stage_is_refused(reviews_csv, capsys):
    status = cli.main(["family", "--stages", "bse", "--reviews-csv", str(reviews_csv)])
    assert status == 2
    assert "'bse'" in capsys.readouterr().err
    assert family.STAGES[-1] == "report"
