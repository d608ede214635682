# SPDX-License-Identifier: Apache-2.0
"""Preference data: sample responses from a model, reward them, draw Bradley-Terry pairs."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common, run_folder
from ivg_fast.training.records import (
    Record,
    TrainingDataError,
    check_records,
    flag_of,
    is_whole,
    whole_lines,
    write_jsonl,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class PreferenceConfig:
    """Settings of `sample_preferences`.

    Each prompt gets `num_samples` responses. Pairs whose rewards differ by less than
    `min_reward_gap` are left out: the draw of their winner is mostly noise. No response ends within
    `min_new_tokens`: a reward that punishes length is learned from responses longer than the model
    would give, as a search that follows a value which has seen none runs on.
    """

    output_dir: str
    num_samples: int = 2
    max_new_tokens: int = 50
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False
    min_new_tokens: int = 0
    min_reward_gap: float = 0.0
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidParameterError(name, getattr(self, name), "must be >= 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InvalidParameterError(
                "min_new_tokens", self.min_new_tokens, f"must be in [0, {self.max_new_tokens}]"
            )
        if not 0 <= self.min_reward_gap < math.inf:
            raise InvalidParameterError("min_reward_gap", self.min_reward_gap, "must be >= 0")
        if not 0 < self.temperature < math.inf:
            raise InvalidParameterError(
                "temperature", self.temperature, "must be positive and finite"
            )
        if self.top_k < 0:
            raise InvalidParameterError("top_k", self.top_k, "must be >= 0, 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise InvalidParameterError("top_p", self.top_p, "must be in (0, 1]")
        common.check_seed(self.seed)


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: PreferenceConfig,
    seed: int,
) -> list[tuple[str, bool]]:
    """One sampled response a prompt, and whether it came to its end of text before the limit.

    One batch of plain `generate`, left-padded.
    """
    import torch

    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    num_prompt_tokens = encoded["input_ids"].shape[1]
    torch.manual_seed(seed)
    with torch.inference_mode():
        rows = model.generate(
            input_ids=encoded["input_ids"].to(model.device),
            attention_mask=encoded["attention_mask"].to(model.device),
            do_sample=True,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            eos_token_id=None if config.ignore_eos else tokenizer.eos_token_id,
            suppress_tokens=[tokenizer.eos_token_id] if config.ignore_eos else None,
            pad_token_id=tokenizer.pad_token_id,
        )
    sampled = rows[:, num_prompt_tokens:]
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    ended = (sampled == tokenizer.eos_token_id).any(-1).tolist()
    return list(zip(texts, ended, strict=True))


def bradley_terry_pairs(
    records: Sequence[Record], seed: int, min_reward_gap: float = 0.0
) -> list[Record]:
    """Pairs of neighbouring responses to the same prompt, the winner drawn from their rewards.

    P(a preferred to b) = sigmoid(reward_a - reward_b). Identical responses make no pair, nor do
    those whose rewards differ by less than `min_reward_gap`.
    """
    rng = random.Random(seed)
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], []).append(record)
    pairs = []
    for prompt, samples in by_prompt.items():
        for first, second in zip(samples[::2], samples[1::2], strict=False):
            difference = max(-60.0, min(60.0, first["reward"] - second["reward"]))
            first_wins = rng.random() < 1 / (1 + math.exp(-difference))
            is_close = abs(first["reward"] - second["reward"]) < min_reward_gap
            if is_close or first["response"] == second["response"]:
                continue
            won, lost = (first, second) if first_wins else (second, first)
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": won["response"],
                    "rejected": lost["response"],
                    "chosen_reward": won["reward"],
                    "rejected_reward": lost["reward"],
                    flag_of("chosen"): is_whole(won),
                    flag_of("rejected"): is_whole(lost),
                }
            )
    return pairs


def ranked_pairs(records: Sequence[Record], seed: int, min_reward_gap: float = 0.0) -> list[Record]:
    """Pairs of each prompt's best response and its worst, its second best and its second worst, and
    so on; otherwise as `bradley_terry_pairs`.
    """
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(record["prompt"], []).append(record)
    ordered: list[Record] = []
    for group in by_prompt.values():
        ranked = sorted(group, key=lambda record: -record["reward"])
        half = len(ranked) // 2
        for best, worst in zip(ranked[:half], reversed(ranked), strict=False):
            ordered += [best, worst]
    return bradley_terry_pairs(ordered, seed, min_reward_gap)


def name_of(reward: Reward) -> str:
    """`module:name` of a function, or of the class of another callable."""
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def rewards_of(reward: Reward, texts: Sequence[str]) -> list[float]:
    """The rewards of the texts.

    Raises:
        TrainingDataError: the callable raised, or returned something else than a finite number a
            text.
    """
    name = name_of(reward)
    try:
        rewards = [float(value) for value in reward(texts)]
    except Exception as error:  # the user's own code: whatever it raises
        raise TrainingDataError(
            f"reward {name} must return a number a text, got {type(error).__name__}: {error}"
        ) from error
    if len(rewards) != len(texts):
        raise TrainingDataError(
            f"reward {name} must return a number a text, got {len(rewards)} for {len(texts)} texts"
        )
    check_records([{"reward": each} for each in rewards], {"reward": float}, f"reward {name}")
    return rewards


def check_room(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: PreferenceConfig,
    model: PreTrainedModel,
) -> None:
    """Raise InvalidParameterError where a prompt leaves no positions for a whole response."""
    encoded = tokenizer(list(prompts), verbose=False)["input_ids"]
    longest = max(map(len, encoded)) + config.max_new_tokens
    common.check_positions("longest prompt + max_new_tokens", longest, model)


def sample_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward: Reward,
    config: PreferenceConfig,
) -> dict[str, Any]:
    """Write `samples.jsonl` and `pairs.jsonl` to `config.output_dir`; return the metrics.

    The reward sees prompt + response. A response that is only an end of text is kept, as what it is
    worth must be learned too. Every batch has its own seed and is written at once, so an
    interrupted run resumes at the batch it was in.
    """
    from tqdm import tqdm

    common.check_tokenizer(tokenizer)
    check_records([{"prompt": p} for p in prompts], {"prompt": str}, "prompts")
    check_room(tokenizer, prompts, config, model)
    inputs = {"data": prompts, "reward": name_of(reward), **run_folder.described(model)}
    folder = run_folder.open_run("preferences", config, inputs)
    if (done := run_folder.finished(folder)) is not None:
        return done
    jobs = [prompt for prompt in prompts for _ in range(config.num_samples)]
    file = folder / "batches.jsonl"
    batches: list[list[Record]] = whole_lines(file)
    start = time.monotonic()
    starts = range(0, len(jobs), config.batch_size)
    model.eval()
    with file.open("a", encoding="utf-8") as handle:
        for i in tqdm(
            range(len(batches), len(starts)),
            "sampling",
            disable=not sys.stderr.isatty(),
        ):
            batch = jobs[starts[i] : starts[i] + config.batch_size]
            responses = sample_responses(model, tokenizer, batch, config, (config.seed << 20) + i)
            texts = [p + r for p, (r, _) in zip(batch, responses, strict=True)]
            rewards = rewards_of(reward, texts)
            records = [
                {"prompt": p, "response": r, "reward": v, flag_of("response"): ended}
                for p, (r, ended), v in zip(batch, responses, rewards, strict=True)
                if r or ended
            ]
            batches.append(records)
            handle.write(json.dumps(records, ensure_ascii=False) + "\n")
            handle.flush()
    samples = [record for records in batches for record in records]
    pairs = bradley_terry_pairs(samples, config.seed, config.min_reward_gap)
    write_jsonl(folder / "samples.jsonl", samples)
    write_jsonl(folder / "pairs.jsonl", pairs)
    return common.write_metrics(
        folder,
        {
            "num_samples": len(samples),
            "num_pairs": len(pairs),
            "mean_reward": sum(r["reward"] for r in samples) / max(1, len(samples)),
            "minutes": (time.monotonic() - start) / 60,
        },
    )
