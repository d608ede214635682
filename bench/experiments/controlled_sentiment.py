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
import sys
from collections.abc import Sequence

from bench.experiments.cli import common_parser, reported, run, settings_of, shown, with_given
from bench.experiments.families import PAPER_BASES, Family, bundled, load_prompts, paper
from bench.experiments.tasks import SENTIMENT

__all__ = ["family_of", "main", "parser", "settings_of"]


def parser() -> argparse.ArgumentParser:
    return common_parser(__doc__.split("\n\n")[0], ("bundled", "paper"))


def family_of(args: argparse.Namespace) -> Family:
    """The preset's models, with those that were given in their place."""
    base = args.paper_base or PAPER_BASES[0]
    return with_given(paper(base) if args.preset == "paper" else bundled(), args)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    command = f"python -m bench.experiments.controlled_sentiment {shown(argv)}"
    return reported(
        lambda: run(SENTIMENT, args, family_of(args), load_prompts(args.prompts), command)
    )


if __name__ == "__main__":
    raise SystemExit(main())
