# SPDX-License-Identifier: Apache-2.0
"""`python -m bench report`: writes the tables of both READMEs from the CSVs in bench/results.

They stand between marker comments and are never typed. Every row of README's is the quotient of two
medians of one run, side by side; the CSV has the command that ran it. To reproduce one, run
that command; to replace all, `python -m bench all --out bench/results`, then this.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Record, read_csv
from bench.tables import RESULTS, ablation, bounds, marked, serving

ROOT = Path(__file__).resolve().parents[1]
OURS = "ivg_fast"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: `what` names it, the rest finds its two records."""

    what: str
    file: str
    kernel: str
    x: str
    other: str
    metric: str = "time"


def _sampling(x: str, kernel: str = "guided_sample", *others: str) -> Iterator[Row]:
    rows, vocab = (part.split("=")[1] for part in x.split())
    for other in others:
        yield Row(f"{kernel}, {rows} rows, vocabulary {vocab}", "ops_cpu", kernel, x, other)


_BOUND = "bound: forwards alone"
ROWS: tuple[Row, ...] = (
    *(
        Row(f"IVG end to end, {what}", "e2e_cpu", "IVG", x, other)
        for what, x in (("one prompt", "prompts=1"), ("eight prompts at once", "prompts=8"))
        for other in ("reference_style", "tuned_pytorch", _BOUND)
    ),
    *(
        row
        for x in ("B=16 V=32000", "B=16 V=128256")
        for row in _sampling(
            x,
            "guided_sample",
            "multinomial chain",
            "cumsum + searchsorted",
            "torch.compile, hierarchical",
            "read",
        )
    ),
    *_sampling("B=16 V=32000", "guided_sample, top-k 50", "sort chain", "torch.topk chain"),
    *_sampling("B=16 V=32000", "guided_sample, top-p 0.9", "sort chain"),
    *(
        Row(f"attention, 16 rows, shared prompt of {p}", "attention_cpu", "paged_attention", x, o)
        for p, x in ((256, "P=256 B=16 q=1"), (1024, "P=1024 B=16 q=1"))
        for o in ("sdpa, gathered before", "sdpa, rows folded")
    ),
    *(
        Row(what, "kv_cpu", kernel, x, other)
        for what, kernel, x, others in (
            (
                "write_kv, 64 tokens",
                "write_kv",
                "tokens=64",
                ("index_put, same pool", "index_copy, pool by slot"),
            ),
            (
                "copy_blocks, 16 blocks of 8 pools",
                "copy_blocks",
                "pairs=16",
                ("index_copy, pool by pool", "reorder whole rows of 256"),
            ),
        )
        for other in others
    ),
)


def _duration(record: Record) -> str:
    seconds = record.y_50 * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[record.unit]
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _one(records: Sequence[Record], row: Row, provider: str) -> Record:
    wanted = (row.kernel, row.x, row.metric, provider)
    found = [r for r in records if (r.kernel, r.x, r.metric, r.provider) == wanted]
    if len(found) != 1:
        raise SystemExit(f"{row.file}.csv: {len(found)} records of {wanted}, should be 1")
    return found[0]


def table(results: Path = RESULTS) -> str:
    """Ours against others: README's table, between its markers."""
    names = dict.fromkeys(row.file for row in ROWS)
    files = {name: read_csv(results / f"{name}.csv") for name in names}
    lines = [
        "| what | ivg_fast | against | takes | times as long |",
        "|---|---:|---|---:|---:|",
    ]
    last = ""
    for row in ROWS:
        ours, other = (_one(files[row.file], row, name) for name in (OURS, row.other))
        what = "" if row.what == last else row.what
        own = "" if row.what == last else _duration(ours)
        last = row.what
        ratio = f"{other.y_50 / ours.y_50:.2g}" if other.y_50 < 9.5 * ours.y_50 else ""
        ratio = ratio or f"{other.y_50 / ours.y_50:.0f}"
        lines.append(f"| {what} | {own} | {row.other} | {_duration(other)} | {ratio} |")
    lines += ["", "Medians, the providers taking turns in one run. What was run, and where:", ""]
    for name, records in files.items():
        used = {_one(records, row, OURS) for row in ROWS if row.file == name}
        configs = sorted({record.config for record in used})
        one = records[0]
        lines.append(f"- `{one.command}`: {'; '.join(configs)}. {one.device}; {one.versions}.")
    return marked("", lines)


def spliced(text: str, new: str) -> str:
    """`text` with what stands between the first and the last line of `new` replaced.

    Raises:
        SystemExit: these lines are not there once each.
    """
    lines = new.splitlines()
    begin, end = lines[0], lines[-1]
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the file must hold each once: {begin} and {end}")
    return text[: text.index(begin)] + new + text[text.index(end) + len(end) :]


# file -> its tables
TABLES: dict[Path, tuple[Callable[[Path], str], ...]] = {
    ROOT / "README.md": (table,),
    ROOT / "bench" / "README.md": (bounds, ablation, serving),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw every stored CSV as well")
    options = parser.parse_args()
    for path, tables in TABLES.items():
        text = path.read_text(encoding="utf-8")
        for new in tables:
            text = spliced(text, new(RESULTS))
        path.write_text(text, encoding="utf-8")
        print(f"wrote the tables of {path.relative_to(ROOT)}")
    if options.plot:
        from bench.plots import draw

        for path in sorted(RESULTS.glob("*.csv")):
            draw(read_csv(path), options.plot / path.stem)
