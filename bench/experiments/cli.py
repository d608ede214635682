# SPDX-License-Identifier: Apache-2.0
"""The command line that experiments share: sizes, weights, machine; the run itself."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bench.experiments.cells import locked
from bench.experiments.experiment import Experiment, Settings, write_report
from bench.experiments.families import PAPER_BASES, Family, Prompts
from bench.experiments.summary import at_equal_kl
from bench.experiments.tasks import Task
from ivg_fast.errors import InvalidParameterError, IVGError
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


def common_parser(description: str, presets: Sequence[str]) -> argparse.ArgumentParser:
    """Options of any experiment; the first preset is the default."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", required=True, help="folder of the results")
    made.add_argument("--quick", action="store_true", help="few prompts, one seed, no sweeps")
    made.add_argument("--no-sweeps", action="store_true", help="the main table only")
    made.add_argument(
        "--time",
        action="store_true",
        help="measure times alone, on a quiet machine; reports of this folder then use them",
    )
    group = made.add_argument_group("models and data")
    group.add_argument("--preset", choices=presets, default=presets[0])
    group.add_argument("--paper-base", choices=PAPER_BASES, help=f"default: {PAPER_BASES[0]}")
    for role in ROLES:
        group.add_argument(f"--{role}", help=f"another {role} model: a folder or hub name")
    group.add_argument("--gold", help="another gold reward: folder, hub name or .npz")
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


def reported(body: Callable[[], object]) -> int:
    """Runs it. What this package refuses ends in one line and status 2."""
    try:
        body()
    except IVGError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def refuse_idle(args: argparse.Namespace, needs: Mapping[str, str | None]) -> None:
    """Raises where an option was given that would change nothing.

    Args:
        needs: what each option is nothing without, as the message says it; None where that is
            there.

    Raises:
        InvalidParameterError: names the first.
    """
    for name, needed in needs.items():
        given = getattr(args, name)
        if needed and given not in (None, False):
            raise InvalidParameterError(name, given, f"must be left out without {needed}")


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


def check_sizes(
    args: argparse.Namespace, settings: Settings, prompts: Mapping[str, Prompts]
) -> None:
    """Raises where a stage of this run would find too few prompts, before any begins.

    Raises:
        InvalidParameterError: names the size.
    """
    stages = [("num_dev_prompts", "dev"), ("num_prompts", "test")]
    if args.time:
        stages.append(("num_timed_prompts", "test"))
    if not (args.quick or args.no_sweeps):
        stages.append(("num_sweep_prompts", "dev"))
    for name, split in stages:
        there, count = len(prompts[split].texts), getattr(settings, name)
        if count > there:
            raise InvalidParameterError(
                name, count, f"must be at most {there}, the {split} prompts that there are"
            )


def with_given(family: Family, args: argparse.Namespace) -> Family:
    """A preset's models, with those that were given in their place, which its name says."""
    given = {name: getattr(args, name) for name in (*ROLES, "gold") if getattr(args, name)}
    if not given:
        return family
    name = f"{family.name} with another {', '.join(given)}"
    gold = given.pop("gold", family.gold)
    return replace(family, name=name, models={**family.models, **given}, gold=gold)


def run(
    task: Task, args: argparse.Namespace, family: Family, prompts: dict[str, Prompts], command: str
) -> None:
    """Every stage of an experiment over the folder `args.out`; prints where the report is."""
    needs = {
        "paper_base": None if args.preset == "paper" else "--preset paper",
        **dict.fromkeys(("judge_name", "num_judged"), None if args.judge else "--judge"),
    }
    refuse_idle(args, needs)
    out, settings = Path(args.out), settings_of(args)
    check_sizes(args, settings, prompts)
    with locked(out):
        experiment = Experiment(out, family, prompts, settings, task)
        try:
            chosen = experiment.choose()
            if args.time:
                experiment.time(chosen)
            results = experiment.main_table(chosen)
            summary = experiment.summary(chosen, results, command)
            write_report(out, summary)
            if not (args.quick or args.no_sweeps):
                summary["weight_sweep"] = experiment.weight_sweep()
                summary["ivg_minus_eft_at_equal_kl"] = at_equal_kl(summary["weight_sweep"])
                summary["search_sweep"] = experiment.search_sweep(chosen["ivg"])
                write_report(out, summary)
        finally:
            experiment.close()
    print(out / "report.md")


def shown(argv: Sequence[str]) -> str:
    """The command line without folders of this machine."""
    return shlex.join(Path(word).name if "/" in word else word for word in argv)
