# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast`: the engine from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers.utils.logging import disable_progress_bar

from ivg_fast.cli import generate, info, score, serve
from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.training import cli as training

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

_EPILOG = """commands teach themselves: ivg-fast COMMAND --help

exit codes: 0 done, 1 something failed (each request that did says so), 2 asked wrongly
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command and option."""
    parser = argparse.ArgumentParser(
        prog="ivg-fast",
        description="Integrated Value Guidance for frozen language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate.add_parser(commands)
    score.add_parser(commands)
    serve.add_parser(commands)
    info.add_parser(commands)
    training.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0: done, 1: something failed, 2: it was asked wrongly."""
    arguments = build_parser().parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights
    if arguments.command == "train":
        return training.run(arguments)
    try:
        return EXIT_OK if arguments.run(arguments) else EXIT_FAILED
    except InvalidParameterError as error:
        print(f"ivg-fast: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (IVGError, OSError) as error:
        print(f"ivg-fast: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("ivg-fast: interrupted", file=sys.stderr)
        return EXIT_FAILED
