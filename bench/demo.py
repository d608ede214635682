# SPDX-License-Identifier: Apache-2.0
"""`make demo`: decodes movie-review prompts by base, EFT, CBS and IVG, and prints what each wrote.

The models are the bundled IMDB family; the gold reward is a sentiment classifier's log-odds of
"positive", which no method sees while it decodes. The last row is IVG as a plain PyTorch loop in
the style of the public implementations, one prompt at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time

from rich.console import Console
from rich.table import Table

from bench.baselines.common import ValueModel
from bench.baselines.reference_style import ReferenceStyleIVG
from ivg_fast import Engine, SearchParams
from ivg_fast.assets import imdb_path
from ivg_fast.models.loading import load_model, load_tokenizer
from ivg_fast.models.value_head import load_value_model
from ivg_fast.training.data import test_prompts
from ivg_fast.training.rewards import GoldReward

# Sampling of the paper's controlled-sentiment experiment (arXiv 2409.17819): T 0.7, 50 tokens.
_SAMPLING = {"max_tokens": 50, "temperature": 0.7, "ignore_eos": True, "seed": 0}


def methods(eft_weight: float, ivg_weight: float) -> dict[str, SearchParams]:
    """The four methods at W, K, L = 4, 4, 5."""
    return {
        "base": SearchParams.base(**_SAMPLING),
        "EFT": SearchParams.eft(guidance_weight=eft_weight, **_SAMPLING),
        "CBS": SearchParams.cbs(scorer="explicit", **_SAMPLING),
        "IVG": SearchParams.ivg(guidance_weight=ivg_weight, **_SAMPLING),
    }


def _plain_pytorch(prompts: list[str], params: SearchParams) -> tuple[list[str], float]:
    """Responses, and the seconds that they took."""
    family = imdb_path()
    tokenizer = load_tokenizer(family / "base")
    value = load_value_model(family / "value")
    searcher = ReferenceStyleIVG(
        *(load_model(family / role) for role in ("base", "tuned", "untuned")),
        ValueModel(value.backbone, value.score_head.weight),
    )
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    begin = time.perf_counter()
    results = searcher.generate(ids, params)
    seconds = time.perf_counter() - begin
    return [tokenizer.decode(result.token_ids) for result in results], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts to decode")
    parser.add_argument("--show", type=int, default=2, help="prompts whose texts are printed")
    # Chosen on dev prompts by bench/experiments/controlled_sentiment.
    parser.add_argument("--eft-weight", type=float, default=1.0, help="guidance weight of EFT")
    parser.add_argument("--ivg-weight", type=float, default=0.5, help="guidance weight of IVG")
    arguments = parser.parse_args()
    chosen = methods(arguments.eft_weight, arguments.ivg_weight)
    console = Console()
    family = imdb_path()
    prompts = test_prompts(arguments.prompts)
    gold = GoldReward.load()
    table = Table("method", "gold reward", "s / prompt", "tokens / s", "base tokens forwarded")
    texts: dict[str, list[str]] = {}
    with Engine.from_pretrained(
        family / "base", family / "tuned", family / "untuned", family / "value"
    ) as engine:
        engine.generate(prompts[:1], SearchParams.ivg(max_tokens=6))  # first-call costs
        for name, params in chosen.items():
            begin = time.perf_counter()
            outputs = engine.generate(prompts, params)
            seconds = time.perf_counter() - begin
            texts[name] = [output.outputs[0].text for output in outputs]
            rewards = gold.score([p + t for p, t in zip(prompts, texts[name], strict=True)])
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            forwarded = sum(output.stats.decode_tokens["base"] for output in outputs)
            table.add_row(
                name,
                f"{statistics.mean(rewards):+.2f}",
                f"{seconds / len(prompts):.2f}",
                f"{tokens / seconds:.0f}",
                str(forwarded),
            )
    few = prompts[:2]
    written, seconds = _plain_pytorch(few, chosen["IVG"])
    rewards = gold.score([p + t for p, t in zip(few, written, strict=True)])
    table.add_row(
        "IVG, plain PyTorch",
        f"{statistics.mean(rewards):+.2f}",
        f"{seconds / len(few):.2f}",
        f"{50 * len(few) / seconds:.0f}",
        "",
    )
    for index in range(min(arguments.show, len(prompts))):
        console.rule(f"prompt {index}")
        for name, written in texts.items():
            console.print(f"[bold]{name:>4}[/bold] [dim]{prompts[index]}[/dim]{written[index]}")
            console.print()
    console.rule(f"{len(prompts)} held-out prompts, 50 tokens, W, K, L = 4, 4, 5")
    console.print(f"Prompts are decoded together; plain PyTorch ran on the first {len(few)} alone.")
    console.print(table)


if __name__ == "__main__":
    main()
