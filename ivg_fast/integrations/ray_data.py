# SPDX-License-Identifier: Apache-2.0
"""Engines in the actors of Ray Data, for a big batch of prompts.

    from ivg_fast.integrations.ray_data import EngineActor, rows_of

    rows = ray.data.from_items(rows_of(prompts))
    rows.map_batches(EngineActor, fn_constructor_kwargs={"base": base, "params": params, ...},
                     concurrency=2, num_cpus=4, batch_size=16).write_json(folder)

An actor that dies is started anew by Ray, and its batch is run again: what a row returns is a
function of its prompt and its `seed` column, not of actor, batch or attempt. This module itself
needs no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import SearchParams
from ivg_fast.prompts import derive_seed


class EngineActor:
    """A class for `Dataset.map_batches`: each actor loads its own engine, once.

    A batch has the columns "prompt" (texts) and "seed" (integers in [0, 2^63)); the result keeps
    all columns and adds "response" (text), "token_ids" (lists), "score", "implicit_reward" and
    "finish_reason" of the best candidate.

    Args:
        base: a folder or hub name.
        params: how each prompt is decoded. Its own seed is not read.
        engine: more arguments of Engine.from_pretrained: `tuned`, `untuned`, `value`, `config`, ...
            Give `EngineConfig(num_threads=...)` the `num_cpus` that an actor asks Ray for.

    Raises:
        InvalidParameterError: a batch without these columns.
        Exception: as Engine.from_pretrained and Engine.generate raise; Ray reports it.
    """

    def __init__(self, base: Any, params: SearchParams, **engine: Any) -> None:
        if not isinstance(params, SearchParams):
            raise InvalidParameterError("params", params, "must be SearchParams")
        self._params = params
        self._engine = Engine.from_pretrained(base, **engine)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """One batch, as NumPy columns; its rows stay in order."""
        for name in ("prompt", "seed"):
            if name not in batch:
                raise InvalidParameterError("batch", sorted(batch), f"must have a column {name!r}")
        prompts = [str(prompt) for prompt in batch["prompt"]]
        seeds = [int(seed) for seed in batch["seed"]]
        best = [o.outputs[0] for o in self._engine.generate(prompts, self._params, seeds=seeds)]
        token_ids = np.empty(len(best), dtype=object)
        for i, candidate in enumerate(best):
            token_ids[i] = np.array(candidate.token_ids, dtype=np.int64)
        return {
            **batch,
            "response": np.array([c.text for c in best], dtype=object),
            "token_ids": token_ids,
            "score": np.array([c.score for c in best]),
            "implicit_reward": np.array([c.implicit_reward for c in best]),
            "finish_reason": np.array([c.finish_reason for c in best], dtype=object),
        }


def rows_of(
    prompts: Sequence[str], *, seed: int = 0, done: Iterable[int] = ()
) -> list[dict[str, Any]]:
    """Rows {"index", "prompt", "seed"} of prompts, without those whose index is `done`: so a job
    that was stopped is taken up with what it has written, and returns what it would have."""
    finished = set(done)
    return [
        # 63 bits: the integers of an Arrow column are signed.
        {"index": i, "prompt": prompt, "seed": derive_seed(seed, i) >> 1}
        for i, prompt in enumerate(prompts)
        if i not in finished
    ]
