# SPDX-License-Identifier: Apache-2.0
"""Summarization: what steering gains on the gists of long reviews, and on the paper's posts.

    python -m ivg_fast.training.summary_family --work runs/summary --out summary-family
    python -m bench.experiments.summarization --family summary-family --out FOLDER

The first command makes the models, in about two hours on two cores; they are not part of the
package. Base, best of 16, EFT, ARGS-style guidance, CBS (implicit, explicit) and IVG summarise
held-out reviews; the judges are the reward of `ivg_fast.training.summary_reward` and ROUGE against
the gist that was taken out of the text. Weights, seeds, sweeps and resuming are those of
`controlled_sentiment`.

`--preset paper` takes the paper's TL;DR models from a hub, with two solved posts before the base's
prompt, and `--prompts`, JSON lines {"split": "dev" or "test", "prompt", "gist"}: posts that end in
a new line, with their authors' own TL;DR as gist (optional).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.experiments.cli import common_parser, reported, run, settings_of, shown, with_given
from bench.experiments.families import PAPER_BASES, Family, Prompts, load_prompts
from bench.experiments.tasks import SUMMARIZATION
from ivg_fast.errors import InvalidParameterError
from ivg_fast.request import ROLES
from ivg_fast.templates import Template, preset
from ivg_fast.training.summary_reward import find_encoder

__all__ = ["family_of", "main", "parser", "settings_of"]

PAPER_GOLD = "chadlzx/golden_rm_summarize"
# The paper's base reads two posts with their summaries first; these are our own.
TWO_SHOT = """\
SUBREDDIT: r/relationships
TITLE: I [24F] feel left out by my roommate [25F] of two years
POST: We used to cook together every Sunday. Since she met her new boyfriend in May she is hardly \
ever home, and last week she forgot the birthday dinner that we had planned for a month. She said \
sorry by text and has not brought it up again. I do not want to make her choose, but I miss my \
friend and I am dreading the talk about renewing our lease.
TL;DR: Roommate neglects our friendship since she has a boyfriend and forgot my birthday dinner; \
how do I raise it before we renew the lease?

SUBREDDIT: r/relationships
TITLE: My [31M] brother [28M] borrowed money and now avoids me
POST: In January my brother asked me for 800 dollars to repair his car, due in \
spring. It is October. He bought a new phone, he goes out every weekend, and whenever I mention \
the loan he changes the subject or leaves the group chat for a day. Our mother says to let it go \
for the sake of peace. I could live without the money, but not with the feeling of being used.
TL;DR: Brother has not repaid 800 dollars and dodges the subject while he spends on himself; \
should I insist or let it go?

"""
TWO_SHOT_TEMPLATE = Template(TWO_SHOT + "{raw}\nTL;DR:")


def summary_family(folder: str | Path, encoder: str | None = None) -> Family:
    """A folder that `ivg_fast.training.summary_family` made; raises if it is none."""
    folder = Path(folder)
    for name in (*ROLES, "prompts.jsonl"):
        if not (folder / name).exists():
            raise InvalidParameterError(
                "family",
                str(folder),
                f"must hold {name}; make it by python -m ivg_fast.training.summary_family --out "
                f"{folder}",
            )
    return Family(
        "summary_family",
        {role: str(folder / role) for role in ROLES},
        encoder or str(find_encoder()),
        dict.fromkeys(ROLES, "tldr-base"),
    )


def paper(base: str) -> Family:
    """The models of the paper's summarization experiment (arXiv 2409.17819), from a hub."""
    chosen = preset("tldr", base=base)
    templates: dict[str, str | Template] = {**chosen.templates, "base": TWO_SHOT_TEMPLATE}
    return Family(f"paper, {base}", chosen.models, PAPER_GOLD, templates)


def parser() -> argparse.ArgumentParser:
    made = common_parser(__doc__.split("\n\n")[0], ("family", "paper"))
    made.add_argument("--family", help="folder that ivg_fast.training.summary_family made")
    return made


def family_of(args: argparse.Namespace) -> Family:
    """The preset's models, with those that were given in their place."""
    if args.preset == "paper":
        if args.family:
            raise InvalidParameterError("family", args.family, "must be left out of --preset paper")
        return with_given(paper(args.paper_base or PAPER_BASES[0]), args)
    if not args.family:
        raise InvalidParameterError(
            "family",
            None,
            "must be a folder that python -m ivg_fast.training.summary_family --out FOLDER made",
        )
    return with_given(summary_family(args.family, args.gold), args)


def prompts_of(args: argparse.Namespace) -> dict[str, Prompts]:
    """Those of the command line, else the family's own.

    Raises:
        InvalidParameterError: none, or for the paper's models one without its last new line.
    """
    source = args.prompts or (args.family and str(Path(args.family) / "prompts.jsonl"))
    if not source:
        raise InvalidParameterError("prompts", None, "must be given for the paper's models")
    found = load_prompts(source)
    if args.preset == "paper":
        for text in (text for split in found.values() for text in split.texts):
            if not text.endswith("\n"):
                # The guides' template puts its cue right behind the text.
                raise InvalidParameterError(
                    "prompts", f"...{text[-40:]}", "must be posts that end in a new line"
                )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    command = f"python -m bench.experiments.summarization {shown(argv)}"
    return reported(lambda: run(SUMMARIZATION, args, family_of(args), prompts_of(args), command))


if __name__ == "__main__":
    raise SystemExit(main())
