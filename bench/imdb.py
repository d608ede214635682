# SPDX-License-Identifier: Apache-2.0
"""The bundled IMDB family by the engine and by both baselines, for side-by-side runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bench.baselines import ReferenceStyleIVG, TunedPyTorchIVG, ValueModel
from ivg_fast import Engine, SearchParams
from ivg_fast.assets import imdb_path
from ivg_fast.models.loading import load_model, load_tokenizer
from ivg_fast.models.value_head import load_value_model
from ivg_fast.outputs import RequestOutput
from ivg_fast.training.data import test_prompts

PAIR = ("tuned", "untuned")
SEED = 1
Prompts = Sequence[Sequence[int]]


class Imdb:
    """One family, three ways. The engine has modules of its own, as it changes their attention."""

    def __init__(self, device: str) -> None:
        folder = imdb_path()
        roles = ("base", *PAIR)
        self.engine = Engine.from_pretrained(
            *(folder / role for role in (*roles, "value")), device=device
        )
        models = [load_model(folder / role) for role in roles]
        value = load_value_model(folder / "value")
        head = ValueModel(value.backbone, value.score_head.weight)
        self.reference = ReferenceStyleIVG(*models, head, device=device)
        self.tuned = TunedPyTorchIVG(*models, head, device=device)
        tokenizer = load_tokenizer(folder / "base")
        self._texts = [tokenizer(text).input_ids for text in test_prompts(64)]

    def prompts(self, num: int, num_tokens: int | None = None) -> list[list[int]]:
        """The first held-out prompts; with `num_tokens`, held-out text of exactly that length."""
        if num_tokens is None:
            return self._texts[:num]
        flat = [token for text in self._texts for token in text]
        if num * num_tokens > len(flat):
            raise ValueError(f"{num} prompts of {num_tokens} tokens: there are {len(flat)} tokens")
        return [flat[i * num_tokens : (i + 1) * num_tokens] for i in range(num)]

    def generate(self, prompts: Prompts, params: SearchParams) -> list[RequestOutput]:
        """By the engine, with the seeds of the baselines' generators."""
        return self.engine.generate(prompts, params, seeds=[SEED + i for i in range(len(prompts))])

    def kv_bytes(self, output: RequestOutput) -> int:
        """KV bytes that the request held at once, at most, over the roles that took part."""
        runners = self.engine._runners
        roles = [role for role, count in output.stats.prefill_tokens.items() if count]
        return output.stats.peak_blocks * sum(runners[role].bytes_per_block for role in roles)


def engine_tokens(outputs: Sequence[RequestOutput]) -> Counter[str]:
    """Tokens that each role forwarded, by SearchStats."""
    counts: Counter[str] = Counter()
    for output in outputs:
        for by_role in (
            output.stats.prefill_tokens,
            output.stats.decode_tokens,
            output.stats.score_tokens,
        ):
            counts.update(by_role)
    return counts


@contextmanager
def counted_tokens(baseline: ReferenceStyleIVG | TunedPyTorchIVG) -> Iterator[Counter[str]]:
    """Counts the tokens that each role of a baseline forwards inside this block, pads included."""
    counts: Counter[str] = Counter()

    def hook(role: str) -> Any:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[role] += (args[0] if args else kwargs["input_ids"]).numel()

        return count

    if isinstance(baseline, ReferenceStyleIVG):
        models = dict(baseline._models)
    else:
        models = {role: cached.model for role, cached in baseline._roles.items()}
    # A head's model calls its base model, and a scorer the base model alone.
    handles = [
        model.base_model.register_forward_pre_hook(hook(role), with_kwargs=True)
        for role, model in models.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
