# SPDX-License-Identifier: Apache-2.0
"""Instruction following: responses for alpaca_eval and IFEval by base, EFT, CBS and IVG.

    python -m bench.experiments.instruction_following --out FOLDER --preset tulu --instructions FILE
    python -m bench.experiments.instruction_following --out FOLDER --recipe WORK --ifeval FILE

`--instructions` is a JSON list as alpaca_eval's data set is; FOLDER/outputs then gets its model
outputs, {instruction, output, generator, dataset}, a file a method. `--ifeval` is IFEval's JSON
lines; the same, and report.md, summary.json and per_prompt.csv by IFEval's own checkers.

`--preset tulu` and `ultra` are the paper's models, templates and settings from a hub (`--base`,
`--tuned`, ... name other folders for single roles). `--recipe WORK` are the guides that `ivg-fast
train instruct --work WORK` made, on the model that they were made from.

What is answered is not answered again. With `--rank R --world-size N` (or the variables RANK and
WORLD_SIZE) each process answers its part, on one FOLDER; `--merge` then gathers the parts, judges
and reports. `--judge REFERENCE` asks alpaca_eval's annotators, which takes an API key.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import ivg_fast
from bench.experiments import alpaca_judge, instruction_report
from bench.experiments.cells import locked
from bench.experiments.cli import refuse_idle, reported
from bench.experiments.ifeval import IFEvalJudge
from bench.experiments.instructions import Item, load_ifeval, load_instructions, subset
from bench.experiments.setups import (
    METHODS,
    PAPER,
    RECIPE,
    VALUE_TEMPLATES,
    Setup,
    load_engine,
    paper_setup,
    recipe_setup,
)
from bench.experiments.shards import Rank, ShardStore, write_alpaca
from ivg_fast import EngineConfig
from ivg_fast.errors import InvalidParameterError
from ivg_fast.request import ROLES

_SEARCH = {
    "beam_width": int,
    "num_candidates": int,
    "chunk_length": int,
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "guidance_weight": float,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", required=True, help="folder of the results")
    group = made.add_argument_group("what is asked")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--instructions", help="JSON list of {instruction, ...}")
    what.add_argument("--ifeval", help="JSON lines of IFEval")
    group.add_argument("--num-prompts", type=int, help="a subset, drawn by --subset-seed")
    group.add_argument("--subset-seed", type=int, default=0)
    group = made.add_argument_group("models")
    who = group.add_mutually_exclusive_group(required=True)
    who.add_argument("--preset", choices=PAPER, help="the paper's models and settings")
    who.add_argument("--recipe", metavar="WORK", help="folder of `ivg-fast train instruct`")
    group.add_argument("--paper-base", help="one of the paper's base models")
    group.add_argument(
        "--value-template", choices=VALUE_TEMPLATES, help=f"default: {VALUE_TEMPLATES[0]}"
    )
    for role in ROLES:
        group.add_argument(f"--{role}", help=f"another {role} model: a folder or hub name")
    group.add_argument("--generator", help="what alpaca_eval calls it, before the method's name")
    group = made.add_argument_group("methods")
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all for --ifeval, else ivg"
    )
    for name, kind in _SEARCH.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, help="default: the preset's")
    group.add_argument("--seed", type=int, default=0)
    group = made.add_argument_group("judges")
    group.add_argument("--nltk-data", help="folder that has NLTK's tokenizers/punkt_tab")
    group.add_argument("--judge", metavar="REFERENCE", help="alpaca_eval's outputs to compare with")
    group.add_argument("--annotators", help=f"default: {alpaca_judge.ANNOTATORS}")
    group.add_argument(
        "--plain-win-rate", action="store_true", help="not length-controlled: of any instructions"
    )
    group = made.add_argument_group("machine")
    group.add_argument("--rank", type=int, help="default: the variable RANK, or 0")
    group.add_argument("--world-size", type=int, help="default: the variable WORLD_SIZE, or 1")
    group.add_argument("--merge", action="store_true", help="gather what all ranks have written")
    group.add_argument("--batch-size", type=int, default=16, help="prompts that decode together")
    group.add_argument("--num-blocks", type=int, help="KV blocks of the engine")
    group.add_argument("--device", help='"cuda": of the variable LOCAL_RANK')
    group.add_argument("--dtype", default="auto")
    return made


def setup_of(args: argparse.Namespace) -> Setup:
    """The models that the command line names, with its own folders and search in place."""
    given = {role: getattr(args, role) for role in ROLES if getattr(args, role)}
    if args.recipe:
        setup = recipe_setup(args.recipe, given)
    else:
        setup = paper_setup(
            args.preset,
            base=args.paper_base,
            models=given,
            value_template=args.value_template or VALUE_TEMPLATES[0],
        )
    search = {name: getattr(args, name) for name in _SEARCH if getattr(args, name) is not None}
    return replace(setup, params=replace(setup.params, **search))


def rank_of(args: argparse.Namespace) -> Rank:
    """The options, else the variables of a launcher."""
    found = []
    for given, variable, default in (
        (args.rank, "RANK", "0"),
        (args.world_size, "WORLD_SIZE", "1"),
    ):
        text = os.environ.get(variable, default)
        if given is None and not text.isdecimal():
            raise InvalidParameterError(variable, text, "must be a number")
        found.append(int(text) if given is None else given)
    return Rank(*found)


def _device_type(device: str | None) -> str:
    try:
        return torch.device(device or "cpu").type
    except RuntimeError as error:
        raise InvalidParameterError("device", device, "must be 'cpu' or 'cuda'") from error


class Run:
    """What a command line describes: decode a part, merge, judge."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args, self.command = args, command
        self.out = Path(args.out)
        every = load_ifeval(args.ifeval) if args.ifeval else load_instructions(args.instructions)
        self.num_in_file = len(every)
        self.items: list[Item] = subset(every, args.num_prompts, args.subset_seed)
        self.setup = setup_of(args)
        self.methods: Sequence[str] = args.methods or (METHODS if args.ifeval else ("ivg",))
        self.rank = rank_of(args)
        if args.batch_size < 1:
            raise InvalidParameterError("batch_size", args.batch_size, "must be >= 1")
        self.versions = {
            "ivg_fast": ivg_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        context = {
            **self.setup.describe(),
            "versions": self.versions,
            "device": _device_type(args.device),
            "dtype": args.dtype,
        }
        self.store = ShardStore(
            self.out / "shards", context, self.setup.params, args.seed, self.setup.max_length
        )

    def decode(self) -> None:
        """Answers what this rank has left; loads no model where nothing is."""
        if not any(self.store.missing(m, self.items, self.rank) for m in self.methods):
            return
        config = EngineConfig(num_blocks=self.args.num_blocks)
        device = self.args.device
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        with (
            locked(self.out / "shards" / self.rank.name),
            load_engine(self.setup, device=device, dtype=self.args.dtype, config=config) as engine,
        ):
            for method in self.methods:
                self.store.run(engine, method, self.items, self.rank, self.args.batch_size)

    def merge(self) -> dict[str, Path]:
        """Writes alpaca_eval's outputs of each method.

        Raises:
            IncompleteError: ranks have not finished.
        """
        folder = self.out / "outputs"
        folder.mkdir(parents=True, exist_ok=True)
        paths = {}
        for method in self.methods:
            name = self.generator(method)
            paths[method] = folder / f"{name}.json"
            write_alpaca(paths[method], self.items, self.store.merged(method, self.items), name)
        return paths

    def generator(self, method: str) -> str:
        """What alpaca_eval calls the method's outputs."""
        base = Path(self.setup.models["base"]).name
        return f"{self.args.generator or f'{base}-{self.setup.name}'}-{method}"

    def report(self, judge: IFEvalJudge) -> dict[str, Any]:
        """IFEval's accuracies of all methods, written to the folder."""
        records = {m: self.store.merged(m, self.items) for m in self.methods}
        verdicts = {
            m: judge.judge(self.items, [r["output"] for r in rows]) for m, rows in records.items()
        }
        params = asdict(self.setup.params)
        summary = {
            "setup": self.setup.name,
            "num_prompts": len(self.items),
            "num_in_file": self.num_in_file,
            "subset_seed": self.args.subset_seed,
            "seed": self.args.seed,
            "params": {name: params[name] for name in _SEARCH},
            "recipe": self._recipe(),
            **instruction_report.figures(verdicts, records),
            "versions": self.versions,
            "command": self.command,
        }
        instruction_report.write(self.out, summary, self.items, verdicts)
        return summary

    def _recipe(self) -> dict[str, Any] | None:
        """What the recipe says of its guides."""
        if self.setup.name != RECIPE:
            return None
        file = Path(self.args.recipe) / "report" / "metrics.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def win_rates(self, paths: dict[str, Path]) -> dict[str, Any]:
        """What alpaca_eval's annotators say, also in win_rates.json."""
        found = {
            method: alpaca_judge.judge(
                path,
                Path(self.args.judge),
                annotators=self.args.annotators or alpaca_judge.ANNOTATORS,
                is_length_controlled=not self.args.plain_win_rate,
                cache=self.out / "annotations.json",
            )
            for method, path in paths.items()
        }
        text = json.dumps(found, indent=1) + "\n"
        (self.out / "win_rates.json").write_text(text, encoding="utf-8")
        return found


def check_options(args: argparse.Namespace) -> None:
    """InvalidParameterError about an option that would say nothing beside the others."""
    of_judge = None if args.judge else "--judge"
    of_paper = "--preset" if args.recipe else None
    refuse_idle(
        args,
        {
            "paper_base": of_paper,
            "value_template": of_paper,
            "nltk_data": None if args.ifeval else "--ifeval",
            "annotators": of_judge,
            "plain_win_rate": of_judge,
        },
    )


def run(args: argparse.Namespace, command: str) -> None:
    check_options(args)
    this = Run(args, command)
    is_whole = args.merge or this.rank.world_size == 1
    # A judge that cannot judge says so before hours of decoding.
    judge = IFEvalJudge(args.nltk_data) if args.ifeval and is_whole else None
    if args.judge:
        alpaca_judge.check_keys(args.annotators or alpaca_judge.ANNOTATORS)
        alpaca_judge.check_reference(Path(args.judge), [item.text for item in this.items])
    if not args.merge:
        this.decode()
    if not is_whole:
        print(f"rank {this.rank.name} is done; when all are, run the same with --merge")
        return
    paths = this.merge()
    for path in paths.values():
        print(path)
    if judge is not None:
        this.report(judge)
        print(this.out / "report.md")
    if args.judge:
        print(json.dumps(this.win_rates(paths)))


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    words = [Path(word).name if "/" in word else word for word in argv]  # none of this machine's
    command = f"python -m bench.experiments.instruction_following {shlex.join(words)}"
    return reported(lambda: run(args, command))


if __name__ == "__main__":
    raise SystemExit(main())
