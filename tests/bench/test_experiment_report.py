# SPDX-License-Identifier: Apache-2.0
"""The Markdown says what the summary holds: rows, marks, what failed; so does the model card."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.experiments.cells import CellResult
from bench.experiments.measures import Measure
from bench.experiments.methods import method
from bench.experiments.report import markdown
from bench.experiments.summary import Judges, at_equal_kl, differences, measure_method, order, times
from ivg_fast.assets import imdb_path
from ivg_fast.training import card

NAMES = {"base": None, "eft": 1.0, "cbs_implicit": None, "cbs_explicit": None, "ivg": 0.5}
MEANS = {"base": 0.0, "eft": 5.0, "cbs_implicit": 3.0, "cbs_explicit": 4.0, "ivg": 6.0}


def _results(tmp_path: Path, means: dict[str, float], load: float = 1.0) -> dict[str, Any]:
    """MethodResults of made-up responses: 2 seeds, 30 prompts, rewards around `means`."""
    found = {}
    for number, (name, weight) in enumerate(NAMES.items()):
        rng = np.random.default_rng(number)
        results, rewards = [], {}
        for seed in range(2):
            records = [
                {
                    "prompt": f"p{i}",
                    "response": " a b a b" if name == "ivg" else f" a b c {i}",
                    "logprob": -10.0,
                    "tokens_forwarded": {"base": 50 + number, "value": 7},
                }
                for i in range(30)
            ]
            batch = {"seconds": 6.0, "cpu_seconds": 3.0, "load": load, "num_prompts": 30}
            key = f"{name}{seed}"
            results.append(CellResult(key, records, [batch]))
            rewards[key] = [[x] for x in rng.normal(means[name], 1, 30)]

        def known(what: str, rows: dict[str, list[list[float]]]) -> Measure:
            for key, values in rows.items():
                (tmp_path / f"{key}-{what}-1.json").write_text(json.dumps(values))
            return Measure(what, "1", pytest.fail)  # type: ignore[arg-type]

        keys = [result.key for result in results]
        judges = Judges(
            tmp_path,
            known("gold", rewards),
            known("lexicon", {key: [[0.25]] * 30 for key in keys}),
            known("base", {key: [[-12.0, -15.0, 5]] * 30 for key in keys}),
            known("judge", {keys[0]: [[-20.0, 10]] * 30}),
            30,
        )
        found[name] = measure_method(method(name, weight), results, judges, num_threads=1)
    return found


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    found = differences(results)
    return {
        "settings": {
            "family": "toy",
            "num_prompts": 30,
            "num_dev_prompts": 8,
            "seeds": [0, 1],
            "weights": [0.5, 1.0],
            "wide_weights": [2.0],
            "min_distinct": 0.9,
            "judge": "some judge",
            "num_judged": 30,
        },
        "chosen_weights": {"eft": 1.0, "ivg": 0.5, "eft_wide": 1.0, "ivg_wide": 0.5},
        "methods": {name: copy.deepcopy(result.figures) for name, result in results.items()},
        "differences": found,
        "order": order(found),
        "versions": {"torch": "2"},
        "device": "a CPU",
        "command": "python -m bench",
    }


def _row(text: str, name: str) -> dict[str, str]:
    """A row of the first table by column."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in cells if row[0] == name and len(row) == len(cells[0])]
    return dict(zip(cells[0], row, strict=True))


def test_figures(tmp_path: Path) -> None:
    results = _results(tmp_path, MEANS)
    ivg = results["ivg"].figures
    gold = results["ivg"].gold
    assert gold.shape == (2, 30)
    assert ivg["gold_by_seed"] == pytest.approx(gold.mean(1).tolist())
    assert ivg["distinct_2"] == pytest.approx(2 / 3)
    assert ivg["perplexity_base"] == pytest.approx(np.exp(3))
    assert ivg["perplexity_judge"] == pytest.approx(np.exp(2))
    assert ivg["kl"]["log_ratio"] == pytest.approx(2)
    assert ivg["kl"]["total"] == pytest.approx(2 + 11 * np.log(4) - 1, abs=1e-5)
    assert (ivg["seconds"], ivg["cpu_seconds"]) == (0.2, 0.1)
    assert ivg["tokens_forwarded"] == {"base": 54, "tuned": 0, "untuned": 0, "value": 7}
    found = differences(results)
    per_prompt = results["ivg"].gold.mean(0) - results["eft"].gold.mean(0)
    assert found["ivg - eft"]["mean"] == pytest.approx(per_prompt.mean())
    low, high = found["ivg - eft"]["interval_95"]
    half = 1.96 * per_prompt.std(ddof=1) / np.sqrt(30)
    assert (low, high) == pytest.approx((per_prompt.mean() - half, per_prompt.mean() + half), 0.1)


def test_the_table(tmp_path: Path) -> None:
    text = markdown(_summary(_results(tmp_path, MEANS)))
    ivg = _row(text, "IVG")
    assert ivg["weight"] == "0.5"
    assert ivg["KL to base"] == "2.0 to 16.2"
    assert ivg["perplexity (some judge)"] == "7.4"
    assert "some judge read the first 30 responses" in text
    assert ivg["s / prompt"] == "0.200"
    assert ivg["tokens forwarded: base, tuned, untuned, value"] == "54, 0, 0, 7"
    assert _row(text, "EFT")["KL to base"] == "2.0"
    assert _row(text, "base")["weight"] == ""
    assert "The paper's order holds" in text
    assert "upper edge of what the rule could choose from: EFT: 1." in text
    assert "Other work shared the cores" not in text


def test_an_order_that_fails_is_said(tmp_path: Path) -> None:
    text = markdown(_summary(_results(tmp_path, {**MEANS, "ivg": 5.0, "cbs_implicit": 0.0})))
    assert "The paper's order holds" not in text
    assert "no interval above 0: cbs_implicit - base, ivg - eft." in text


def test_ivg_at_another_weight_is_no_method_of_the_order(tmp_path: Path) -> None:
    results = _results(tmp_path, MEANS)
    (tmp_path / "more").mkdir()
    more = _results(tmp_path / "more", {**MEANS, "ivg": MEANS["ivg"] + 1})["ivg"]
    text = markdown(_summary({**results, "ivg_wide": more, "eft_wide": more}))
    assert "no interval above 0: ivg - eft_wide." in text


def test_times_of_a_loaded_machine_are_marked(tmp_path: Path) -> None:
    summary = _summary(_results(tmp_path, MEANS, load=1.6))
    text = markdown(summary)
    assert _row(text, "IVG")["s / prompt"] == "0.200*"
    assert "Other work shared the cores" in text
    quiet = {"seconds": 0.11, "cpu_seconds": 0.1, "is_loaded": False}
    text = markdown({**summary, "timing": dict.fromkeys(summary["methods"], quiet)})
    assert _row(text, "IVG")["s / prompt"] == "0.110"
    assert "Other work shared the cores" not in text
    batch = {"seconds": 1.0, "cpu_seconds": 1.0, "load": 2.2, "num_prompts": 4}
    assert not times([batch], 2)["is_loaded"]
    assert times([batch], 1)["is_loaded"]


def test_gains_at_equal_kl() -> None:
    def row(name: str, weight: float | None, kl: float, gold: float) -> dict[str, Any]:
        return {"method": name, "weight": weight, "gold": gold, "kl": {"total": kl}}

    rows = [
        row("ivg", 0.5, 15.0, 8.0),
        row("eft", 2.0, 40.0, 9.0),
        row("base", None, 0.0, 1.0),
        row("eft", 1.0, 20.0, 7.0),
        row("args", 1.0, 15.0, 50.0),
        row("ivg", 1.0, 30.0, 8.0),
        row("ivg", 2.0, 60.0, 9.5),  # farther than EFT ever was
    ]
    found = {row["weight"]: row["difference"] for row in at_equal_kl(rows)}
    assert found == pytest.approx({0.5: 8 - (1 + 6 * 15 / 20), 1.0: 0.0})


def test_the_card_of_no_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path)], [str(imdb_path()), "--results", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            card.main(words)
        assert ended.value.code == 2
        assert f"{tmp_path} must be a folder with" in capsys.readouterr().err


def test_the_card_reads_the_results(tmp_path: Path) -> None:
    summary = _summary(_results(tmp_path, MEANS))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    samples = [
        {"method": name, "prompt": f"q{i}", "response": f" of {name}|", "gold": float(i)}
        for name in NAMES
        for i in range(12)
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "samples.jsonl").write_text(lines)
    text = card.render(imdb_path(), tmp_path)
    ivg = summary["methods"]["ivg"]
    assert f"| ivg | 0.5 | {ivg['gold']:.2f} |" in text
    assert "| 7.4 | 2.0 to 16.2 |" in text
    assert "some judge" in text
    assert "| ivg - eft |" in text
    assert text.count("of ivg/") == 10
    assert "- (+9.0) **q9** of ivg/" in text


def test_summarization_says_whose_second_judge_is_below_base(tmp_path: Path) -> None:
    results = _results(tmp_path, MEANS)
    summary = _summary(results)
    for figures in summary["methods"].values():
        figures["rouge"] = figures.pop("lexicon")
    summary["task"] = "summarization"
    for name, delta in (("eft", -0.1), ("ivg", 0.1)):
        results[name].second = results[name].second + delta
    summary["second_differences"] = differences(results, "second")
    text = markdown(summary)
    assert text.startswith("# Summarization\n")
    assert _row(text, "IVG")["rouge"] == "0.250"
    assert "| eft - base | -0.100 | -0.100 to -0.100 |" in text
    assert "Below base beyond the interval: eft." in text
    results["eft"].second = results["base"].second
    summary["second_differences"] = differences(results, "second")
    assert "None is below." in markdown(summary)
