# SPDX-License-Identifier: Apache-2.0
"""The Markdown of a run, from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NAMES = {
    "base": "base",
    "best_of_16": "best of 16 (explicit)",
    "eft": "EFT",
    "args": "ARGS-style, token-wise explicit",
    "cbs_implicit": "CBS (implicit)",
    "cbs_explicit": "CBS (explicit)",
    "ivg": "IVG",
    "eft_wide": "EFT, any weight",
    "args_wide": "ARGS-style, any weight",
    "ivg_wide": "IVG, any weight",
}

_NOTES = """\
95% intervals by bootstrap over prompts. distinct-n: share of distinct
runs of n words within a response. KL: in nats a response, to the base at the sampling temperature;
token-wise methods by the mean of log p(response) - log p_base(response), which is unbiased. Of
methods that select, a range: that mean for what they select from, which the KL is not below, and
with the most that selecting can add (`bench.experiments.statistics`). Tokens forwarded: a prompt,
by role, prompt included. ARGS-style guides over all tokens: the engine's top-k filters the combined
logits, so ARGS's restriction to the base's top k is not made.
"""

_SWEEP_HEAD = (
    *("method", "weight", "W, K, L", "gold reward", "95%", "distinct-2", "perplexity (base)"),
    *("KL to base", "CPU s / prompt", "base tokens forwarded"),
)


@dataclass(frozen=True, slots=True)
class Wording:
    """What reports of one task say; `second` is the second judge's name in the figures."""

    title: str
    length: str
    second: str
    reward: str
    unit: str


_SENTIMENT = Wording(
    "Controlled sentiment",
    "50 tokens, no end of text",
    "lexicon",
    "Reward: of prompt + response; ",
    "log-odds",
)
_WORDINGS = {
    "summarization": Wording(
        "Summarization",
        "128 tokens at most, a line or an end of text",
        "rouge",
        "Reward: 10 times the cosine of the sentence embeddings of text and summary, minus 0.2 a\n"
        "word beyond 25, minus 4 times the share of copied words; the paper's is a reward model.\n"
        "rouge: ROUGE-1 F against the reference, or the text where there is none. ",
        "reward",
    )
}


def wording(summary: Mapping[str, Any]) -> Wording:
    return _WORDINGS.get(summary.get("task", ""), _SENTIMENT)


def label(name: str) -> str:
    return _NAMES.get(name, name)


def markdown(summary: Mapping[str, Any]) -> str:
    """The report: main table, differences, order, sweeps."""
    settings, words = summary["settings"], wording(summary)
    lines = [
        f"# {words.title}",
        "",
        f"{settings['num_prompts']} held-out test prompts, seeds "
        f"{', '.join(map(str, settings['seeds']))}; W, K, L = 4, 4, 5, temperature 0.7, "
        f"{words.length}; models: {settings['family']}. Weights chosen on "
        f"{settings['num_dev_prompts']} dev prompts: the highest gold reward among those of "
        f"{_list(settings['weights'])} whose distinct-2 is at least {settings['min_distinct']} of "
        'the base\'s (where none is, the highest distinct-2); "any weight" is the same rule over '
        f"{_list(sorted({*settings['weights'], *settings['wide_weights']}))} too, where it chooses "
        "another weight.",
        "",
        *_main_table(summary),
        "",
        words.reward + _NOTES,
        *_judge_note(settings),
        *_time_note(summary),
        *_edge_note(summary),
        "## Differences in gold reward",
        "",
        *_table(
            ("difference", "mean", "95% interval (paired bootstrap over prompts)"),
            [
                (name, f"{row['mean']:+.2f}", _interval(row["interval_95"]))
                for name, row in summary["differences"].items()
            ],
        ),
        "",
        *_order(summary["order"]),
        *_second(summary, words),
        *_sweeps(summary),
        *_samples(summary),
        "",
        f"Made by `{summary['command']}`; {_versions(summary)}; device: {summary['device']}.",
    ]
    return "\n".join(lines) + "\n"


def _main_table(summary: Mapping[str, Any]) -> list[str]:
    methods = summary["methods"]
    has_judge = any("perplexity_judge" in row for row in methods.values())
    head = ["method", "weight", "gold reward", "95%", "by seed", wording(summary).second]
    head += [f"perplexity ({summary['settings']['judge']})"] if has_judge else []
    head += ["perplexity (base)", "distinct-1", "distinct-2", "distinct-3", "KL to base"]
    head += ["s / prompt", "CPU s / prompt", "tokens forwarded: base, tuned, untuned, value"]
    rows = []
    for name, row in methods.items():
        timed = summary.get("timing", {}).get(name, row)
        cells = [
            label(name),
            "" if row["weight"] is None else f"{row['weight']:g}",
            f"{row['gold']:.2f}",
            _interval(row["gold_interval_95"]),
            ", ".join(f"{value:.2f}" for value in row["gold_by_seed"]),
            f"{row[wording(summary).second]:.3f}",
        ]
        if has_judge:
            cells.append(f"{row['perplexity_judge']:.1f}" if "perplexity_judge" in row else "-")
        cells += [f"{row['perplexity_base']:.1f}"]
        cells += [f"{row[f'distinct_{n}']:.3f}" for n in (1, 2, 3)]
        cells += [kl_text(row["kl"]), f"{timed['seconds']:.3f}{'*' * timed['is_loaded']}"]
        cells += [f"{timed['cpu_seconds']:.3f}"]
        cells += [", ".join(f"{value:.0f}" for value in row["tokens_forwarded"].values())]
        rows.append(cells)
    return _table(head, rows)


def kl_text(kl: Mapping[str, Any]) -> str:
    low, high = (f"{round(kl[name], 1) + 0.0:.1f}" for name in ("log_ratio", "total"))  # no -0.0
    return f"{low} to {high}" if kl["is_upper_bound"] else low


def _judge_note(settings: Mapping[str, Any]) -> list[str]:
    if not settings["judge"]:
        return []
    return [
        f"{settings['judge']} read the first {settings['num_judged']} responses of each method, "
        "first seed; it had no part in any model here.",
        "",
    ]


def _time_note(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    if "timing" in summary:
        lines.append("Times are of a run of their own (`--time`), methods taking turns.")
    timed = summary.get("timing", summary["methods"])
    if any(row["is_loaded"] for row in timed.values()):
        lines.append("* Other work shared the cores: compare CPU seconds, not seconds.")
    return [" ".join(lines), ""] if lines else []


def _edge_note(summary: Mapping[str, Any]) -> list[str]:
    settings, chosen = summary["settings"], summary["chosen_weights"]
    grids = {
        "": settings["weights"],
        "_wide": [*settings["weights"], *settings["wide_weights"]],
    }
    edges = [
        f"{label(kind + suffix)}: {chosen[kind + suffix]:g}"
        for suffix, grid in grids.items()
        for kind in ("eft", "args", "ivg")
        if chosen.get(kind + suffix) == max(grid)
    ]
    if not edges:
        return []
    return [f"At the upper edge of what the rule could choose from: {'; '.join(edges)}.", ""]


def _order(claims: Mapping[str, bool]) -> list[str]:
    failed = [claim for claim, holds in claims.items() if not holds]
    if not failed:
        return ["The paper's order holds: base below EFT and CBS, IVG above each."]
    return [
        "Of the paper's order (base below EFT and CBS, IVG above each) these differences have no "
        f"interval above 0: {', '.join(failed)}. The others do."
    ]


def _second(summary: Mapping[str, Any], words: Wording) -> list[str]:
    """The second judge against base, where the task asks that it is not worse."""
    found = {
        name: row
        for name, row in summary.get("second_differences", {}).items()
        if name.endswith(" - base")
    }
    if not found:
        return []
    worse = [
        name.removesuffix(" - base") for name, row in found.items() if row["interval_95"][1] < 0
    ]
    verdict = f"Below base beyond the interval: {', '.join(worse)}." if worse else "None is below."
    rows = [
        (name, f"{row['mean']:+.3f}", "{:.3f} to {:.3f}".format(*row["interval_95"]))
        for name, row in found.items()
    ]
    return [
        "",
        f"## Differences in {words.second}",
        "",
        *_table(("difference", "mean", "95% interval (paired bootstrap over prompts)"), rows),
        "",
        verdict,
    ]


def _samples(summary: Mapping[str, Any]) -> list[str]:
    """The first prompts with every method's response, first seed."""
    samples = summary.get("samples", [])
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    if not by_prompt:
        return []
    lines = ["", "## Samples", "", "The first test prompts, first seed, not chosen."]
    for prompt, own in by_prompt.items():
        lines += ["", f"> {' '.join(prompt.split())}", ""]
        if own[0]["reference"]:
            lines.append(f"- reference: {own[0]['reference']}")
        for sample in own:
            text = " ".join(sample["response"].split())
            lines.append(f"- {label(sample['method'])} ({sample['gold']:+.1f}): {text}")
    return lines


def _sweeps(summary: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for title, rows in (
        ("Guidance weight", summary.get("weight_sweep", [])),
        ("Width, candidates, chunk length", summary.get("search_sweep", [])),
    ):
        if not rows:
            continue
        at_equal_kl = title == "Guidance weight" and summary.get("ivg_minus_eft_at_equal_kl")
        lines += [
            "",
            f"## {title}",
            "",
            f"{rows[0]['num_prompts']} dev prompts, one seed.",
            "",
            *_table(
                _SWEEP_HEAD,
                [
                    (
                        label(row["method"]),
                        "" if row["weight"] is None else f"{row['weight']:g}",
                        _search(row["params"]),
                        f"{row['gold']:.2f}",
                        _interval(row["gold_interval_95"]),
                        f"{row['distinct_2']:.3f}",
                        f"{row['perplexity_base']:.1f}",
                        kl_text(row["kl"]),
                        f"{row['cpu_seconds']:.3f}",
                        f"{row['tokens_forwarded']['base']:.0f}",
                    )
                    for row in rows
                ],
            ),
        ]
        if at_equal_kl:
            gains = ", ".join(
                f"{row['difference']:+.2f} (w = {row['weight']:g})" for row in at_equal_kl
            )
            lines += [
                "",
                "IVG's gold reward minus EFT's at the same KL, IVG's taken at its upper bound and "
                f"EFT between its weights by linear interpolation: {gains}.",
            ]
    return lines


def _search(params: Mapping[str, Any]) -> str:
    if params["beam_width"] * params["num_candidates"] == 1:
        return ""
    chunk = params["chunk_length"] or "whole"
    return f"{params['beam_width']}, {params['num_candidates']}, {chunk}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _interval(pair: Sequence[float]) -> str:
    return f"{pair[0]:.2f} to {pair[1]:.2f}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _versions(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
