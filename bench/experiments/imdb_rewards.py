# SPDX-License-Identifier: Apache-2.0
"""Does steering raise the reward? Base, EFT, CBS(explicit) and IVG on held-out IMDB prompts.

    python -m bench.experiments.imdb_rewards --out bench/results/imdb_rewards

The guidance weight is chosen on the dev prompts, among those whose responses repeat themselves
hardly more than the base's do (a bag-of-words reward is easily won by saying "great" all the time);
then every method runs on the test prompts with every seed. Reported a method: mean gold reward,
second judge (lexicon), perplexity under a held-out language model if `--judge` names one,
distinct-2; for pairs of methods the difference in gold reward with a paired bootstrap 95% interval
over prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ivg_fast
from ivg_fast import Engine, SearchParams
from ivg_fast.assets import imdb_path
from ivg_fast.training import common
from ivg_fast.training.data import dev_prompts, test_prompts
from ivg_fast.training.records import write_jsonl
from ivg_fast.training.rewards import GoldReward, LexiconReward

WIDTH, NUM_CANDIDATES, CHUNK = 4, 4, 5
DEV_SEED = 1000


@dataclass(frozen=True, slots=True)
class Method:
    """A named way to decode; `weight` is its guidance weight, 0 without guidance."""

    name: str
    weight: float
    params: SearchParams


def methods(eft_weight: float, ivg_weight: float) -> list[Method]:
    """The paper's controlled-sentiment settings (arXiv 2409.17819): T 0.7, 50 tokens, 4, 4, 5."""
    sampling: dict[str, Any] = {"max_tokens": 50, "temperature": 0.7, "ignore_eos": True}
    search = {"beam_width": WIDTH, "num_candidates": NUM_CANDIDATES, "chunk_length": CHUNK}
    ivg = SearchParams.ivg(guidance_weight=ivg_weight, **search, **sampling)
    return [
        Method("base", 0.0, SearchParams.base(**sampling)),
        Method("eft", eft_weight, SearchParams.eft(guidance_weight=eft_weight, **sampling)),
        Method("cbs", 0.0, SearchParams.cbs(scorer="explicit", **search, **sampling)),
        Method("ivg", ivg_weight, ivg),
    ]


def decode(engine: Engine, prompts: Sequence[str], method: Method, seed: int) -> list[str]:
    """One response a prompt."""
    outputs = engine.generate(list(prompts), replace(method.params, seed=seed), use_tqdm=True)
    return [output.outputs[0].text for output in outputs]


def distinct_2(texts: Sequence[str]) -> float:
    """Share of distinct word pairs within a text, mean over texts."""
    shares = []
    for text in texts:
        words = text.split()
        pairs = list(itertools.pairwise(words))
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    return float(np.mean(shares))


@torch.inference_mode()
def judge_perplexity(folder: str, prompts: Sequence[str], responses: Sequence[str]) -> float:
    """Perplexity of the responses, given their prompts, under the language model in `folder`."""
    model, tokenizer = common.load_model(folder).eval(), common.load_tokenizer(folder)
    total, count = 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        num_prompt = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"]])
        logits = model(input_ids=ids).logits[0, num_prompt - 1 : -1].log_softmax(-1)
        total -= logits.gather(-1, ids[0, num_prompt:, None]).sum().item()
        count += ids.shape[1] - num_prompt
    return math.exp(total / count)


def bootstrap(difference: np.ndarray, seed: int = 0, draws: int = 10_000) -> list[float]:
    """95% interval of the mean of a difference per prompt, by resampling prompts."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, len(difference), (draws, len(difference)))
    return np.quantile(difference[index].mean(-1), [0.025, 0.975]).tolist()


def dev_table(
    engine: Engine, gold: GoldReward, weights: Sequence[float], num_prompts: int
) -> list[dict[str, Any]]:
    """Gold reward and distinct-2 on dev prompts: base, and EFT and IVG with each weight."""
    prompts = dev_prompts(num_prompts)
    rows = []
    for weight in (0.0, *weights):
        for method in methods(weight, weight):
            if (method.name == "base") != (weight == 0) or method.name == "cbs":
                continue
            responses = decode(engine, prompts, method, DEV_SEED)
            texts = [p + r for p, r in zip(prompts, responses, strict=True)]
            rows.append(
                {
                    "method": method.name,
                    "weight": weight,
                    "gold": float(np.mean(gold.score(texts))),
                    "distinct_2": distinct_2(responses),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def choose_weight(rows: Sequence[dict[str, Any]], method: str, min_distinct: float) -> float:
    """The weight of highest gold reward whose distinct-2 is >= min_distinct times the base's.

    Where none is, the one of highest distinct-2.
    """
    floor = min_distinct * rows[0]["distinct_2"]
    own = [row for row in rows if row["method"] == method]
    fluent = [row for row in own if row["distinct_2"] >= floor]
    if fluent:
        return float(max(fluent, key=lambda row: row["gold"])["weight"])
    return float(max(own, key=lambda row: row["distinct_2"])["weight"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default=str(imdb_path()))
    parser.add_argument("--out", required=True)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-dev-prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--min-distinct", type=float, default=0.9)
    parser.add_argument("--judge", help="folder of a language model for the perplexity")
    parser.add_argument("--judge-name", help="what the results call it")
    parser.add_argument("--num-judged", type=int, default=200, help="responses a method it reads")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(args.family)
    engine = Engine.from_pretrained(
        *(folder / role for role in ("base", "tuned", "untuned", "value"))
    )
    gold, lexicon = GoldReward.load(folder / "gold_reward.npz"), LexiconReward()

    dev = dev_table(engine, gold, args.weights, args.num_dev_prompts)
    chosen = {name: choose_weight(dev, name, args.min_distinct) for name in ("eft", "ivg")}
    prompts = test_prompts(args.num_prompts)
    rewards: dict[str, np.ndarray] = {}
    summary: dict[str, Any] = {}
    for method in methods(chosen["eft"], chosen["ivg"]):
        records, start = [], time.monotonic()
        for seed in args.seeds:
            responses = decode(engine, prompts, method, seed)
            texts = [p + r for p, r in zip(prompts, responses, strict=True)]
            for prompt, response, reward, second in zip(
                prompts, responses, gold.score(texts), lexicon.score(texts), strict=True
            ):
                records.append(
                    {
                        "method": method.name,
                        "seed": seed,
                        "prompt": prompt,
                        "response": response,
                        "gold": reward,
                        "lexicon": second,
                    }
                )
        seconds = time.monotonic() - start
        write_jsonl(out / f"{method.name}.jsonl", records)
        table = np.array([r["gold"] for r in records]).reshape(len(args.seeds), len(prompts))
        rewards[method.name] = table.mean(0)
        responses = [record["response"] for record in records]
        summary[method.name] = {
            "weight": method.weight,
            "gold": float(table.mean()),
            "gold_by_seed": table.mean(1).tolist(),
            "lexicon": float(np.mean([record["lexicon"] for record in records])),
            "distinct_2": distinct_2(responses),
            "seconds": seconds,
        }
        if args.judge:
            summary[method.name]["perplexity"] = judge_perplexity(
                args.judge,
                [record["prompt"] for record in records[: args.num_judged]],
                responses[: args.num_judged],
            )
        print(json.dumps({method.name: summary[method.name]}), flush=True)
    differences = {
        f"{a} - {b}": {
            "mean": float((rewards[a] - rewards[b]).mean()),
            "interval_95": bootstrap(rewards[a] - rewards[b]),
        }
        for a, b in (("eft", "base"), ("cbs", "base"), ("ivg", "eft"), ("ivg", "cbs"))
    }
    result = {
        "dev": dev,
        "chosen_weights": chosen,
        "methods": summary,
        "differences": differences,
        "settings": {
            "num_prompts": args.num_prompts,
            "num_dev_prompts": args.num_dev_prompts,
            "seeds": args.seeds,
            "dev_seed": DEV_SEED,
            "weights": args.weights,
            "min_distinct": args.min_distinct,
            "judge": args.judge_name if args.judge else None,
            "num_judged": args.num_judged,
        },
        "versions": {"ivg_fast": ivg_fast.__version__, "torch": torch.__version__},
    }
    (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(differences))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
