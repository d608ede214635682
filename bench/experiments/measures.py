# SPDX-License-Identifier: Apache-2.0
"""What is measured of responses after they were decoded, cached beside the cells.

A measure maps records to a row of numbers each. Its file is named by the cell and by what measures,
and grows with the cell.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from bench.experiments.cells import CellResult, Record
from bench.experiments.families import Family, Prompts, fingerprint
from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.loading import load_model
from ivg_fast.training.rewards import GoldReward, LexiconReward
from ivg_fast.training.summary_reward import SentenceEncoder, SummaryReward, rouge

BATCH = 16
Rows = list[list[float]]


@dataclass(slots=True)
class Measure:
    """A named measure; `make` loads what it needs, once, when something is missing.

    `version` is what tells its results from those of another model.
    """

    name: str
    version: str
    make: Callable[[], Callable[[Sequence[Record]], Rows]]
    _run: Callable[[Sequence[Record]], Rows] | None = None

    def rows(self, folder: Path, result: CellResult, count: int | None = None) -> Rows:
        """A row a record, of the first `count` records (None: all)."""
        records = result.records[:count]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{result.key}-{self.name}-{self.version}.json"
        known: Rows = json.loads(path.read_text()) if path.exists() else []
        if len(known) < len(records):
            self._run = self._run or self.make()
            known += self._run(records[len(known) :])
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known))
            os.replace(part, path)
        return known[: len(records)]


def whole_text(record: Record) -> str:
    """What rewards read: the raw prompt and the response."""
    return record["prompt"] + record["response"]


def gold_measure(family: Family, device: str = "cpu") -> Measure:
    """The gold reward, logit(positive) - logit(negative)."""

    def make() -> Callable[[Sequence[Record]], Rows]:
        score = (
            GoldReward.load(family.gold).score
            if family.gold.endswith(".npz")
            else ClassifierReward(family.gold, device).score
        )
        return lambda records: [[x] for x in score([whole_text(r) for r in records])]

    return Measure("gold", _safe(fingerprint(family.gold, "gold")), make)


def lexicon_measure() -> Measure:
    """The second judge, which nothing here was trained on."""

    def make() -> Callable[[Sequence[Record]], Rows]:
        score = LexiconReward().score
        return lambda records: [[x] for x in score([whole_text(r) for r in records])]

    return Measure("lexicon", "vader", make)


def summary_measure(family: Family, device: str = "cpu") -> Measure:
    """The reward of a summary: by a sentence encoder, or by a reward model, whichever gold is.

    A reward model reads the post, "TL;DR: " and the summary, as the paper's guides do.
    """

    version = _safe(fingerprint(family.gold, "gold"))
    wanted = "must be a reward model or a folder of the sentence encoder"
    try:
        kinds = AutoConfig.from_pretrained(family.gold).architectures or [""]
    except (OSError, ValueError) as error:
        raise InvalidParameterError("gold", family.gold, wanted) from error
    is_reward_model = kinds[0].endswith("ForSequenceClassification")
    if not is_reward_model and not (Path(family.gold) / "model.safetensors").is_file():
        raise InvalidParameterError("gold", family.gold, wanted)

    def make() -> Callable[[Sequence[Record]], Rows]:
        if is_reward_model:
            score = ClassifierReward(family.gold, device).score
            return lambda records: [
                [x]
                for x in score([r["prompt"] + "TL;DR: " + r["response"].strip() for r in records])
            ]
        reward = SummaryReward(SentenceEncoder(family.gold))
        return lambda records: [
            [x]
            for x in reward.score_pairs(
                [r["prompt"] for r in records], [r["response"] for r in records]
            )
        ]

    return Measure("gold", version, make)


def rouge_measure(prompts: Mapping[str, Prompts]) -> Measure:
    """ROUGE-1 F and ROUGE-L F against the reference; of a prompt without one, against itself."""
    references = {p: gist for split in prompts.values() for p, gist in split.references.items()}
    texts = json.dumps(sorted(references.items()))
    version = hashlib.sha256(texts.encode()).hexdigest()[:16]

    def make() -> Callable[[Sequence[Record]], Rows]:
        return lambda records: rouge(
            [references.get(r["prompt"], r["prompt"]) for r in records],
            [r["response"] for r in records],
        )

    return Measure("rouge", version, make)


def base_measure(family: Family, temperature: float, device: str = "cpu") -> Measure:
    """Under the base: log p(y) at `temperature`, log p(y) at 1, tokens of y."""

    def make() -> Callable[[Sequence[Record]], Rows]:
        model = load_model(family.models["base"], device=device, dtype="float32")

        def run(records: Sequence[Record]) -> Rows:
            ids = [(r["prompt_ids"], r["token_ids"]) for r in records]
            columns = response_logprobs(model, ids, (temperature, 1.0))
            return [[*row, len(y)] for row, (_, y) in zip(columns, ids, strict=True)]

        return run

    return Measure(f"base_t{temperature}", _safe(fingerprint(family.models["base"], "base")), make)


def judge_measure(source: str, device: str = "cpu") -> Measure:
    """Under a language model that had no part in it: log p(response | prompt), its tokens.

    `source` is a folder, a hub name or a .gguf file.
    """

    def make() -> Callable[[Sequence[Record]], Rows]:
        model, tokenizer = load_judge(source)
        model.to(device)

        def run(records: Sequence[Record]) -> Rows:
            ids = [split_ids(tokenizer, r["prompt"], whole_text(r)) for r in records]
            columns = response_logprobs(model, ids, (1.0,))
            return [[row[0], len(y)] for row, (_, y) in zip(columns, ids, strict=True)]

        return run

    return Measure("judge", _safe(fingerprint(source, "judge")), make)


def load_judge(source: str) -> tuple[Any, Any]:
    """Model (float32, eval) and tokenizer of a folder, a hub name or a .gguf file."""
    path = Path(source)
    name, options = (
        (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})
    )
    if not options:
        options["use_safetensors"] = True
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    options.pop("use_safetensors", None)
    return model.eval(), AutoTokenizer.from_pretrained(name, **options)


def split_ids(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Tokens of `text` up to as many as the prompt alone has, and the rest."""
    num_prompt = max(1, len(tokenizer(prompt)["input_ids"]))
    ids = tokenizer(text)["input_ids"]
    return ids[:num_prompt], ids[num_prompt:]


@torch.inference_mode()
def response_logprobs(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperatures: Sequence[float],
) -> Rows:
    """log p(response | prompt), summed over tokens, at each temperature, of (prompt, response) ids.

    Rows are padded on the right, where causal attention never looks, and go longest first.
    """
    rows: Rows = [[0.0] * len(temperatures) for _ in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for begin in range(0, len(order), BATCH):
        batch = order[begin : begin + BATCH]
        texts = [torch.tensor([*pairs[i][0], *pairs[i][1]]) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
        # All ones: the padding is never read, and saying nothing about it makes transformers warn.
        mask = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(batch):
            start, end = len(pairs[i][0]), len(texts[row])
            own = logits[row, start - 1 : end - 1].double()
            for column, temperature in enumerate(temperatures):
                table = (own / temperature).log_softmax(-1)
                chosen = table.gather(-1, ids[row, start:end, None])
                rows[i][column] = float(chosen.sum())
    return rows


class ClassifierReward:
    """logit(positive) - logit(negative) of a classifier; the logit, where it has one label."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        self._model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True
        ).eval()
        self._model.to(device)
        if self._model.config.num_labels not in (1, 2):
            raise InvalidParameterError("gold", source, "must have one label or two")

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        """One number a text."""
        scores: list[float] = []
        for begin in range(0, len(texts), BATCH):
            inputs = self._tokenizer(
                list(texts[begin : begin + BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            inputs.pop("token_type_ids", None)
            logits = self._model(**inputs.to(self._model.device)).logits
            own = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]
            scores += own.tolist()
        return scores


def _safe(name: str) -> str:
    return name.replace("/", "_")
