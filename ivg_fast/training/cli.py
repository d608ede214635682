# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast train sft|preferences|dpo|value|family|instruct`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common
from ivg_fast.training.dpo import DPORecipe
from ivg_fast.training.preferences import PreferenceConfig
from ivg_fast.training.records import PAIR_COLUMNS, SAMPLE_COLUMNS, read_jsonl, read_texts
from ivg_fast.training.sft import SFTConfig
from ivg_fast.training.stages import reported
from ivg_fast.training.value import ValueConfig

_KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}


def _add_config(parser: argparse.ArgumentParser, config: type) -> None:
    """One option a field of the recipe's configuration, with the field's default."""
    for field in dataclasses.fields(config):
        flag = "--output" if field.name == "output_dir" else "--" + field.name.replace("_", "-")
        if field.default is dataclasses.MISSING:
            parser.add_argument(flag, dest=field.name, required=True, metavar="FOLDER")
        elif field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            kind = _KINDS[str(field.type)]
            parser.add_argument(flag, type=kind, default=field.default, help="%(default)s")


def _config(args: argparse.Namespace, config: type) -> Any:
    return config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(config)})


def load_reward(name: str) -> Callable[[Sequence[str]], Sequence[float]]:
    """A reward by name: "gold", "lexicon", or the "module:attribute" of a callable on texts."""
    from ivg_fast.training import rewards

    if name == "gold":
        return rewards.GoldReward.load()
    if name == "lexicon":
        return rewards.LexiconReward()
    module, _, attribute = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidParameterError(
            "reward", name, f"must be gold, lexicon or an importable module:attribute ({error})"
        ) from error
    if not callable(reward):
        raise InvalidParameterError("reward", name, "must name a callable")
    return reward


def _sft(args: argparse.Namespace) -> dict[str, Any]:
    from ivg_fast.training.response_sft import RESPONSE_COLUMNS, train_responses
    from ivg_fast.training.sft import new_gpt2, train_sft

    config = _config(args, SFTConfig)
    tokenizer = common.load_tokenizer(args.tokenizer or args.model)
    if args.new is not None:
        layers, hidden = args.new
        model = new_gpt2(tokenizer, layers, hidden, config.block_size, config.seed)
    else:
        model = common.load_model(args.model)
    if args.response_only:
        records = read_jsonl(args.data, RESPONSE_COLUMNS)
        held_out = read_jsonl(args.eval_data, RESPONSE_COLUMNS) if args.eval_data else ()
        return train_responses(model, tokenizer, records, config, held_out)
    texts = read_texts(args.data)
    eval_texts = read_texts(args.eval_data) if args.eval_data else ()
    return train_sft(model, tokenizer, texts, config, eval_texts)


def _preferences(args: argparse.Namespace) -> dict[str, Any]:
    from ivg_fast.training.preferences import sample_preferences

    config = _config(args, PreferenceConfig)
    records = read_jsonl(args.prompts, {"prompt": str})
    prompts = list(dict.fromkeys(record["prompt"] for record in records))
    reward = load_reward(args.reward)
    tokenizer = common.load_tokenizer(args.model)
    model = common.load_model(args.model)
    return sample_preferences(model, tokenizer, prompts, reward, config)


def _dpo(args: argparse.Namespace) -> dict[str, Any]:
    from ivg_fast.training.dpo import train_dpo

    config = _config(args, DPORecipe)
    pairs = read_jsonl(args.data, PAIR_COLUMNS)
    tokenizer = common.load_tokenizer(args.model)
    return train_dpo(common.load_model(args.model), tokenizer, pairs, config)


def _value(args: argparse.Namespace) -> dict[str, Any]:
    from ivg_fast.training.value import train_value
    from ivg_fast.training.value_model import value_model_from

    config = _config(args, ValueConfig)
    samples = read_jsonl(args.data, SAMPLE_COLUMNS)
    tokenizer = common.load_tokenizer(args.model)
    return train_value(value_model_from(args.model, args.head), tokenizer, samples, config)


def _family(args: argparse.Namespace) -> dict[str, Any]:
    from ivg_fast.training import family

    return family.run(args)


def _instruct(args: argparse.Namespace) -> dict[str, Any]:
    from ivg_fast.training import instruct

    return instruct.run(args)


def add_parser(subparsers: Any) -> None:
    """Add `train` and its recipes to the subparsers of `ivg-fast`."""
    train = subparsers.add_parser("train", help="train models and value functions")
    recipes = train.add_subparsers(dest="recipe", required=True)

    sft = recipes.add_parser("sft", help="train a language model on texts")
    sft.add_argument("--model", help="model to start from: folder or hub name")
    sft.add_argument("--tokenizer", help="tokenizer, if not the model's")
    sft.add_argument(
        "--new", type=int, nargs=2, metavar=("LAYERS", "HIDDEN"), help="new GPT-2, random weights"
    )
    sft.add_argument("--data", required=True, help="JSON lines: text, or prompt and response")
    sft.add_argument("--eval-data", help="JSON lines for the held-out perplexity")
    sft.add_argument(
        "--response-only",
        action="store_true",
        help="prompt and response: the loss counts the response and its end of text alone",
    )
    _add_config(sft, SFTConfig)
    sft.set_defaults(run=_sft)

    preferences = recipes.add_parser("preferences", help="sample responses and label them")
    preferences.add_argument("--model", required=True, help="model to sample from")
    preferences.add_argument("--prompts", required=True, help="JSON lines: prompt")
    preferences.add_argument(
        "--reward", default="gold", help="gold, lexicon or module:attribute (default gold)"
    )
    _add_config(preferences, PreferenceConfig)
    preferences.set_defaults(run=_preferences)

    dpo = recipes.add_parser("dpo", help="tune on preference pairs")
    dpo.add_argument("--model", required=True, help="the untuned model")
    dpo.add_argument("--data", required=True, help="JSON lines: prompt, chosen, rejected")
    _add_config(dpo, DPORecipe)
    dpo.set_defaults(run=_dpo)

    value = recipes.add_parser("value", help="train an explicit prefix value")
    value.add_argument("--model", required=True, help="language model that gives the backbone")
    value.add_argument("--data", required=True, help="JSON lines: prompt, response, reward")
    value.add_argument("--head", choices=("vocabulary", "scalar"), default="vocabulary")
    _add_config(value, ValueConfig)
    value.set_defaults(run=_value)

    family = recipes.add_parser("family", help="rebuild the bundled IMDB family from nothing")
    from ivg_fast.training.family import add_arguments

    add_arguments(family)
    family.set_defaults(run=_family)

    instruct = recipes.add_parser("instruct", help="guides for following instructions")
    from ivg_fast.training import instruct as instruct_recipe

    instruct_recipe.add_arguments(instruct)
    instruct.set_defaults(run=_instruct)


def run(args: argparse.Namespace) -> int:
    """Run the recipe that `args` names; the exit status of `reported`."""
    if args.recipe == "sft" and not args.model and not (args.new and args.tokenizer):
        print("error: give --model, or --new LAYERS HIDDEN with --tokenizer", file=sys.stderr)
        return 2
    return reported(lambda: args.run(args))


def main(argv: list[str] | None = None) -> int:
    """`python -m ivg_fast.training.cli sft ...`, the same as `ivg-fast train sft ...`."""
    parser = argparse.ArgumentParser(prog="ivg-fast")
    add_parser(parser.add_subparsers(dest="command", required=True))
    arguments = sys.argv[1:] if argv is None else argv
    return run(parser.parse_args(["train", *arguments]))


if __name__ == "__main__":
    raise SystemExit(main())
