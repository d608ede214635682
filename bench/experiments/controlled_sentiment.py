# SPDX-License-Identifier: Apache-2.0
"""Controlled sentiment: what steering gains, how far it goes from the base, and what it costs.

    python -m bench.experiments.controlled_sentiment --out FOLDER

Base, best of 16, EFT, ARGS-style token-wise guidance, CBS (implicit, explicit) and IVG on held-out
prompts of movie reviews. Guidance weights are chosen on the dev prompts by a fixed rule
(`methods.choose_weight`), then every method runs on the test prompts with every seed; sweeps over
the weight and over W, K, L run on dev prompts. Run again with the same FOLDER it goes on where it
stopped: what is decoded or measured is not run again, and a changed setting is not mixed in.
FOLDER gets report.md, summary.json, per_prompt.csv, samples.jsonl and plots; in cells/ and
measures/ is every response.

The models are the bundled IMDB family; `--preset paper` takes the paper's (gpt2, gpt2-large or
gpt2-xl and its guides) and its gold reward from a hub instead.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.experiments.cells import locked
from bench.experiments.experiment import Experiment, Settings, write_report
from bench.experiments.families import PAPER_BASES, Family, bundled, load_prompts, paper
from bench.experiments.summary import at_equal_kl
from ivg_fast.request import ROLES

QUICK: dict[str, Any] = {
    "num_prompts": 8,
    "num_dev_prompts": 6,
    "num_timed_prompts": 4,
    "seeds": (0,),
    "weights": (0.5, 1.0),
    "wide_weights": (),
    "num_judged": 8,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("--out", required=True, help="folder of the results")
    made.add_argument("--quick", action="store_true", help="few prompts, one seed, no sweeps")
    made.add_argument("--no-sweeps", action="store_true", help="the main table only")
    made.add_argument(
        "--time",
        action="store_true",
        help="measure times alone, on a quiet machine; reports of this folder then use them",
    )
    group = made.add_argument_group("models and data")
    group.add_argument("--preset", choices=["bundled", "paper"], default="bundled")
    group.add_argument("--paper-base", choices=PAPER_BASES, default=PAPER_BASES[0])
    for role in ROLES:
        group.add_argument(f"--{role}", help=f"another {role} model: a folder or hub name")
    group.add_argument("--gold", help="another gold reward: .npz, or a classifier of two labels")
    group.add_argument("--prompts", help='JSON lines {"split": "dev" or "test", "prompt"}')
    group.add_argument("--judge", help="language model for the perplexity: folder, name or .gguf")
    group.add_argument("--judge-name", help="what the report calls it")
    group.add_argument("--num-judged", type=int, help="responses a method it reads")
    group = made.add_argument_group("sizes")
    for name in ("num_prompts", "num_dev_prompts", "num_sweep_prompts", "num_timed_prompts"):
        group.add_argument(_flag(name), type=int)
    group.add_argument("--seeds", type=int, nargs="+")
    group.add_argument("--weights", type=float, nargs="+", help="what the rule chooses from")
    group.add_argument("--wide-weights", type=float, nargs="*", help="and beyond, reported beside")
    group.add_argument("--min-distinct", type=float, help="floor, as a share of base's distinct-2")
    group = made.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, help="prompts that decode together")
    group.add_argument("--threads", type=int, dest="num_threads")
    group.add_argument("--device")
    group.add_argument("--dtype")
    return made


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(args: argparse.Namespace) -> Settings:
    """The defaults, those of --quick over them, what was given over both."""
    chosen = dict(QUICK) if args.quick else {}
    for item in fields(Settings):
        given = getattr(args, item.name)
        if given is not None:
            chosen[item.name] = tuple(given) if isinstance(given, list) else given
    if args.judge and not args.judge_name:
        chosen["judge_name"] = Path(args.judge).stem
    return Settings(**chosen)


def family_of(args: argparse.Namespace) -> Family:
    """The preset's models, with those that were given in their place."""
    family = paper(args.paper_base) if args.preset == "paper" else bundled()
    given = {role: getattr(args, role) for role in ROLES if getattr(args, role)}
    if not given and not args.gold:
        return family
    return Family(
        family.name, {**family.models, **given}, args.gold or family.gold, family.templates
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    out = Path(args.out)
    command = f"python -m bench.experiments.controlled_sentiment {_shown(argv)}"
    with locked(out):
        run = Experiment(out, family_of(args), load_prompts(args.prompts), settings_of(args))
        try:
            chosen = run.choose()
            if args.time:
                run.time(chosen)
            results = run.main_table(chosen)
            summary = run.summary(chosen, results, command)
            write_report(out, summary)
            if not (args.quick or args.no_sweeps):
                summary["weight_sweep"] = run.weight_sweep()
                summary["ivg_minus_eft_at_equal_kl"] = at_equal_kl(summary["weight_sweep"])
                summary["search_sweep"] = run.search_sweep(chosen["ivg"])
                write_report(out, summary)
        finally:
            run.close()
    print(out / "report.md")
    return 0


def _shown(argv: Sequence[str]) -> str:
    """The command line without folders of this machine."""
    return shlex.join(Path(word).name if "/" in word else word for word in argv)


if __name__ == "__main__":
    raise SystemExit(main())
