# SPDX-License-Identifier: Apache-2.0
"""alpaca_eval's annotators on outputs in hand: win rates against a reference."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.experiments.ifeval import JudgeError
from bench.experiments.instructions import load_instructions
from ivg_fast.errors import InvalidParameterError

ANNOTATORS = "weighted_alpaca_eval_gpt4_turbo"
# What a decoder of alpaca_eval asks for, by the start of its name.
_KEYS = {
    "openai": ("OPENAI_API_KEY", "OPENAI_API_KEYS"),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "google": ("GOOGLE_API_KEY",),
    "cohere": ("COHERE_API_KEY",),
    "jinachat": ("JINA_CHAT_API_KEY",),
}


def check_keys(annotators: str | Path) -> None:
    """Whether the annotators of a configuration of alpaca_eval can be asked from here.

    Raises:
        JudgeError: alpaca_eval or an API key is missing; says which.
        InvalidParameterError: no such configuration.
    """
    for decoder in _decoders(_resolved(annotators)):
        names = _KEYS.get(decoder.split("_")[0], ())
        if not names or any(os.environ.get(name) for name in names):
            continue
        if decoder.startswith("openai") and _client_config().is_file():
            continue
        raise JudgeError(
            f"alpaca_eval's annotator {str(annotators)!r} asks {decoder}, which needs an API key: "
            f"set {' or '.join(names)}, or name a local annotator's configs.yaml by --annotators"
        )


def check_reference(reference: Path, instructions: Iterable[str]) -> None:
    """Whether a file of alpaca_eval has an output for each instruction.

    Raises:
        TrainingDataError: no such file, or not such a list.
        InvalidParameterError: it lacks some.
    """
    lacking = set(instructions) - {item.text for item in load_instructions(reference)}
    if lacking:
        raise InvalidParameterError(
            "judge", str(reference), f"must have all instructions; it lacks {len(lacking)}"
        )


def _resolved(annotators: str | Path) -> str:
    """A file or folder that is here by its whole path: alpaca_eval looks in its own folder."""
    path = Path(annotators)
    return str(path.resolve() if path.exists() else path)


def _decoders(annotators: str | Path) -> list[str]:
    try:
        from alpaca_eval import constants, utils
    except ImportError as error:
        raise JudgeError(f"judging needs the extra `alpaca-eval` ({error})") from error
    try:
        configs = utils.load_configs(annotators, relative_to=Path(constants.EVALUATORS_CONFIG_DIR))
    except (OSError, ValueError) as error:
        raise InvalidParameterError(
            "annotators", str(annotators), f"must be a configuration of alpaca_eval ({error})"
        ) from error
    return [str(config["fn_completions"]) for config in configs.values()]


def _client_config() -> Path:
    from alpaca_eval import constants

    return Path(constants.OPENAI_CLIENT_CONFIG_PATH)


def judge(
    outputs: Path,
    reference: Path,
    *,
    annotators: str | Path = ANNOTATORS,
    is_length_controlled: bool = True,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The leaderboard's row of `outputs` against `reference`, both files of alpaca_eval.

    Args:
        annotators: a name or a folder or file of alpaca_eval's.
        is_length_controlled: its length-controlled win rate, whose model reads the difficulty of
            its 805 instructions from a hub; else the plain one, of any instructions.
        cache: where annotations are kept, so that nothing is asked twice.

    Raises:
        JudgeError: an API key is missing; nothing has been asked then.
        InvalidParameterError: the files are not about the same instructions.
    """
    check_keys(annotators)
    from alpaca_eval import evaluate
    from alpaca_eval.utils import load_or_convert_to_dataframe

    ours, theirs = (load_or_convert_to_dataframe(path) for path in (outputs, reference))
    lacking = set(ours["instruction"]) - set(theirs["instruction"])
    if lacking:
        raise InvalidParameterError(
            "reference", str(reference), f"must have all instructions; it lacks {len(lacking)}"
        )
    theirs = theirs[theirs["instruction"].isin(set(ours["instruction"]))]
    metric = "length_controlled_winrate" if is_length_controlled else "win_rate"
    leaderboard, _ = evaluate(
        model_outputs=ours,
        reference_outputs=theirs,
        annotators_config=_resolved(annotators),
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        output_path=None,
        caching_path=None if cache is None else str(cache),
        fn_metric="get_length_controlled_winrate" if is_length_controlled else "get_winrate",
        sort_by=metric,
    )
    (name,) = leaderboard.index
    row = leaderboard.loc[name].to_dict()
    return {"generator": str(name), **row}
