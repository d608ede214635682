# SPDX-License-Identifier: Apache-2.0
"""A model config of alpaca_eval whose completions come from an Engine.

    from alpaca_eval import evaluate_from_model
    from ivg_fast.integrations.alpaca_eval import model_config

    evaluate_from_model(model_config("ivg-mistral-7b", base, SearchParams.ivg(max_tokens=2048, ...),
                                     tuned=tuned, untuned=untuned, value=value))

This module itself needs no alpaca_eval: what it returns is what a `configs.yaml` would hold.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import SearchParams
from ivg_fast.prompts import derive_seed

# alpaca_eval takes a template by its path; this one is the bare instruction, which the engine's own
# templates then write for each role.
PROMPT_TEMPLATE = Path(__file__).with_name("alpaca_eval_prompt.txt")


def model_config(
    name: str,
    base: Any,
    params: SearchParams,
    *,
    prompt_template: str | Path = PROMPT_TEMPLATE,
    seed: int = 0,
    **engine: Any,
) -> dict[str, dict[str, Any]]:
    """For `alpaca_eval.evaluate_from_model(model_config(...))`.

    Args:
        name: the `generator` in its outputs and leaderboard.
        base: a folder or hub name, or an Engine that is there already.
        params: how each instruction is answered.
        prompt_template: the path of one with `{instruction}` in it, which every role's own template
            then takes as its text. Default: the instruction itself.
        seed: an instruction's random numbers are a function of it and of the prompt's text, so an
            evaluation that is taken up again, or run in other chunks, gives the same outputs.
        engine: more arguments of Engine.from_pretrained: `tuned`, `untuned`, `value`, `templates`,
            `config`, ...

    Raises:
        InvalidParameterError: arguments that cannot be. Models are loaded at the first completion.
    """
    template = Path(prompt_template).resolve()
    if not template.is_file():
        raise InvalidParameterError("prompt_template", str(prompt_template), "must be a file")
    return {
        name: {
            "prompt_template": str(template),
            "fn_completions": EngineCompletions(base, params, seed=seed, **engine),
            "completions_kwargs": {},
            "pretty_name": name,
        }
    }


class EngineCompletions:
    """A decoder function of alpaca_eval, with the engine that it keeps from chunk to chunk.

    Args:
        base, params, seed, engine: as of `model_config`.

    Raises:
        InvalidParameterError: `params` that are none, or more than an Engine where one is given.
    """

    def __init__(self, base: Any, params: SearchParams, *, seed: int = 0, **engine: Any) -> None:
        if not isinstance(params, SearchParams):
            raise InvalidParameterError("params", params, "must be SearchParams")
        if isinstance(base, Engine) and engine:
            raise InvalidParameterError("engine", sorted(engine), "must be empty with an Engine")
        self._base = base
        self._params = params
        self._seed = seed
        self._arguments = engine
        self._engine: Engine | None = base if isinstance(base, Engine) else None

    def __call__(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        """`completions`, `price_per_example` (0) and `time_per_example` in seconds, in order."""
        if self._engine is None:
            self._engine = Engine.from_pretrained(self._base, **self._arguments)
        start = time.perf_counter()
        seeds = [prompt_seed(self._seed, prompt) for prompt in prompts]
        outputs = self._engine.generate(list(prompts), self._params, seeds=seeds)
        took = (time.perf_counter() - start) / max(1, len(prompts))
        return {
            "completions": [output.outputs[0].text for output in outputs],
            "price_per_example": [0.0] * len(prompts),
            "time_per_example": [took] * len(prompts),
        }

    def close(self) -> None:
        """Closes the engine, if it was made here; the next call makes another."""
        if self._engine is not None and self._engine is not self._base:
            self._engine.close()
            self._engine = None


def prompt_seed(seed: int, prompt: str) -> int:
    """64 bits of a prompt's text and a seed, whatever else is asked beside it."""
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    return derive_seed(seed, 1 + int.from_bytes(digest[:7], "little"))
