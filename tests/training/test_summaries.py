# SPDX-License-Identifier: Apache-2.0
"""Gap sentences, the reward of summaries, training on responses, and the family out of them."""

from __future__ import annotations

import csv
import json
import math
import random

import numpy as np
import pytest
import torch
from summary_standins import WORDS, save_encoder, save_start
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import cli, summary_family, summary_reward
from ivg_fast.training.gists import excerpt, gists, sentences
from ivg_fast.training.imdb import Review
from ivg_fast.training.records import SAMPLE_COLUMNS, read_jsonl, write_jsonl
from ivg_fast.training.response_sft import IGNORED, response_batch, response_perplexity
from ivg_fast.training.summary_reward import CUE, SentenceEncoder, SummaryReward, copied_share
from ivg_fast.training.value_model import PrefixValueModel


class BagOfWords:
    """An encoder with a known answer: unit vectors of word counts."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self.num_encoded = 0

    def encode(self, texts):
        found = np.zeros((len(texts), 200), np.float32)
        self.num_encoded += len(texts)
        for row, text in zip(found, texts, strict=True):
            for word in text.lower().strip(".").split():
                row[self._index.setdefault(word.strip("."), len(self._index))] += 1
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-9)


def test_sentences_and_excerpt():
    text = "It was good. Why? No! 3.5 of 5 stars... The end"
    assert sentences(text) == ["It was good.", "Why?", "No! 3.5 of 5 stars...", "The end"]
    assert " ".join(excerpt("One two. Three four five. Six.", 5)) == "One two. Three four five."
    assert excerpt("One two three.", 2) == []


def test_gist_is_the_sentence_nearest_to_the_rest():
    told = "The ship sinks near ice at night."
    others = ["The ship sinks at sea.", "Ice and night at the ship.", "Near the ship is ice."]
    odd = "My brother never likes popcorn or queues."
    review = Review(" ".join([odd, others[0], told, *others[1:]]), 1, "train")
    short = Review("Too few. Sentences here.", 0, "train")
    (found,) = gists([short, review], BagOfWords())
    assert found.gist == told
    assert told not in found.text
    assert found.text == " ".join([odd, *others])
    assert gists([short], BagOfWords()) == []


def test_reward_prefers_likeness_and_punishes_length_and_copies():
    reward = SummaryReward(BagOfWords())
    text = "the ship sinks near the ice at night and many people drown in the cold sea"
    near, far = "a ship sinks at night near ice", "my brother likes popcorn and queues"
    values = reward.score_pairs([text] * 5, [near, far, text, " ".join([near] * 10), " "])
    assert values[0] > values[1]
    assert values[2] == pytest.approx(10 - 4, abs=1e-4)  # the whole text, all of it copied
    # Ten times over it points the same way: what differs is 45 words too many.
    assert values[3] == pytest.approx(values[0] - 0.2 * 45, abs=1e-4)
    assert values[4] == 0.0
    assert reward([text + CUE + " " + near]) == pytest.approx(values[:1])
    with pytest.raises(InvalidParameterError, match="TL;DR"):
        reward(["no cue"])


def test_a_text_is_encoded_once():
    encoder = BagOfWords()
    reward = SummaryReward(encoder)
    reward.score_pairs(["a b", "a b"], ["c", "d"])
    reward.score_pairs(["a b"], ["e"])
    assert encoder.num_encoded == 1 + 2 + 1


def test_copied_share():
    text = "one two three four five six seven"
    assert copied_share("one two three four five", text) == 1
    assert copied_share("one two three four nine", text) == 0
    assert copied_share("one two three four five nine nine nine nine nine", text) == 0.5
    assert copied_share("six seven", text) == 1
    assert copied_share("", text) == 0


def test_rouge_of_known_overlaps():
    pytest.importorskip("rouge_score", reason="needs the extra `train`")
    same, half, none = summary_reward.rouge(["a b c d"] * 3, ["a b c d", "a c x y", "p q"])
    assert same == [1, 1]
    assert half == pytest.approx([0.5, 0.5])
    assert none == [0, 0]


def test_encoder_pools_what_is_no_padding(tmp_path):
    encoder = SentenceEncoder(save_encoder(tmp_path))
    texts = ["the film", "the film was great and the plot was boring", "awful"]
    together = encoder.encode(texts)
    assert np.linalg.norm(together, axis=-1) == pytest.approx(1, abs=1e-5)
    for row, text in zip(together, texts, strict=True):
        assert encoder.encode([text])[0] == pytest.approx(row, abs=1e-5)
    assert abs(together[0] - together[2]).max() > 1e-3
    with pytest.raises(InvalidParameterError, match=r"model\.safetensors"):
        SentenceEncoder(tmp_path / "none")


def test_labels_are_the_responses_alone():
    batch = response_batch([([5, 6, 7, 0], 2), ([8, 0], 1)], pad_token_id=0)
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 7, 0],
        [IGNORED, 0, IGNORED, IGNORED],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_response_perplexity_against_plain_sums(tiny_model, tokenizer, samples):
    records = samples[:20]
    total, count = 0.0, 0
    with torch.inference_mode():
        for record in records:
            prompt = tokenizer(record["prompt"])["input_ids"]
            response = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
            logits = tiny_model(torch.tensor([prompt + response])).logits[0].double()
            table = logits.log_softmax(-1)
            for i, token in enumerate(response):
                total -= float(table[len(prompt) + i - 1, token])
            count += len(response)
    found = response_perplexity(tiny_model, tokenizer, records, 64)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)


def test_response_only_learns_the_response_and_not_the_prompt(model_folder, tmp_path, capsys):
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=5)) for _ in range(64)]
    records = [{"prompt": p, "response": " great plot"} for p in prompts]
    write_jsonl(tmp_path / "data.jsonl", records)
    arguments = ["sft", "--model", str(model_folder), "--data", str(tmp_path / "data.jsonl")]
    arguments += ["--eval-data", str(tmp_path / "data.jsonl"), "--response-only"]
    arguments += ["--batch-size", "8", "--epochs", "10", "--learning-rate", "2e-2"]
    arguments += ["--block-size", "64"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    metrics = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert metrics["eval_perplexity"] < 1.2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def prompt_loss(model):
        ids = torch.tensor([tokenizer(p)["input_ids"][:5] for p in prompts])
        with torch.inference_mode():
            return model(ids, labels=ids).loss.item()

    assert prompt_loss(after) > prompt_loss(before) - 0.1
    # Control: on whole texts the same run learns the prompts' words too.
    whole = [a for a in arguments if a != "--response-only"]
    assert cli.main([*whole, "--output", str(tmp_path / "whole")]) == 0
    whole_loss = prompt_loss(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    assert whole_loss < prompt_loss(before) - 0.5
    # Again: nothing is left to train, and other settings are refused.
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), "--seed", "1"]) == 2


@pytest.fixture(scope="module")
def reviews_csv(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("csv") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label", "source"])
        for _ in range(600):
            parts = [" ".join(rng.choices(WORDS, k=rng.randint(6, 10))) for _ in range(6)]
            text = " ".join(part.capitalize() + "." for part in parts)
            writer.writerow([text, rng.randrange(2), "imdb"])
    return path


def test_family_from_nothing(reviews_csv, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="needs the extra `train`")
    start, encoder = save_start(tmp_path / "start"), save_encoder(tmp_path / "encoder")
    arguments = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments += ["--start", str(start), "--encoder", str(encoder)]
    arguments += ["--reviews-csv", str(reviews_csv)]
    assert summary_family.main([*arguments, "--stages", "data,untuned"]) == 0
    assert not (tmp_path / "out").exists()
    assert summary_family.main(arguments) == 0
    out = tmp_path / "out"
    for name in ("base", "untuned", "tuned"):
        AutoModelForCausalLM.from_pretrained(out / name)
    assert PrefixValueModel.load(out / "value").head == "vocabulary"
    report = json.loads((out / "metrics.json").read_text())
    assert 0 <= report["value_accuracy"] <= 1
    assert f"{report['gist_reward']:.2f}" in (out / "README.md").read_text()
    columns = {"split": str, "prompt": str, "gist": str, "value": str}
    records = read_jsonl(out / "prompts.jsonl", columns)
    tokenizer = AutoTokenizer.from_pretrained(out / "value")
    lengths = [len(tokenizer(record["value"])["input_ids"]) for record in records]
    assert max(lengths) - min(lengths) <= 4
    assert abs(lengths[0] - summary_family.TINY.value_prompt_tokens) <= 4
    splits = {s: {r["prompt"] for r in records if r["split"] == s} for s in ("dev", "test")}
    assert splits["dev"]
    assert splits["test"]
    assert not splits["dev"] & splits["test"]
    trained = read_jsonl(tmp_path / "work" / "preferences" / "samples.jsonl", {"prompt": str})
    assert {r["prompt"].removesuffix(CUE) for r in trained}.isdisjoint(
        splits["dev"] | splits["test"]
    )
    # the value has read the guided base, rewarded as everything is
    guided = read_jsonl(tmp_path / "work" / "guided" / "samples.jsonl", SAMPLE_COLUMNS)
    assert len(guided) > summary_family.TINY.num_prompts
    assert {r["prompt"] for r in guided} <= {r["prompt"] for r in trained}
    reward = SummaryReward(SentenceEncoder(encoder))
    expected = reward([r["prompt"] + r["response"] for r in guided])
    assert [r["reward"] for r in guided] == pytest.approx(expected, abs=1e-4)
    # long responses are longer than untuned's own, and some of them are in the pairs
    family = summary_family.SummaryFamily(
        tmp_path / "work", summary_family.TINY, start=start, encoder=encoder
    )
    long = {r["response"] for r in family.samples("long")}
    assert len(long) > 1
    pairs = family.pairs()
    assert any(pair[side] in long for pair in pairs for side in ("chosen", "rejected"))
    # a second run has nothing left to train
    stamp = (tmp_path / "work" / "base" / "model.safetensors").stat().st_mtime_ns
    assert summary_family.main(arguments) == 0
    assert (tmp_path / "work" / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    # nor does an interrupted stage of data encode again what it had
    (tmp_path / "work" / "data" / "metrics.json").unlink()
    monkeypatch.setattr(summary_family, "gists", lambda *_: pytest.fail("encoded again"))
    assert summary_family.main(arguments) == 0
    assert summary_family.main([*arguments, "--stages", "bse"]) == 2
    assert "'bse'" in capsys.readouterr().err
    assert summary_family.main([*arguments, "--seed", "1"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err
