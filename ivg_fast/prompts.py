# SPDX-License-Identifier: Apache-2.0
"""What comes in: prompts and parameters, checked and turned into requests before anything runs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ivg_fast.errors import CapacityError, InvalidParameterError, UnsupportedModelError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import ExplicitValue
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.rendering import Prompt, PromptInput, PromptRenderer
from ivg_fast.request import GUIDES, LiveRequest

_KIND_NAMES = {"scalar": "number a prefix", "text": "number a text"}
_MASK64 = 2**64 - 1


class RequestFactory:
    """Makes requests of what a user gives, or says what is wrong with it.

    Args:
        runners: the models by role.
        tokenizer: the base model's, or None.
        renderer: writes a prompt for each role.
        vocab_size: ids that all models share.
        config: of the engine.
        value: the engine's explicit value.
        eos_ids: ids that end a text; `eos_id`: the one that scoring appends, None if there is none.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        tokenizer: Any,
        renderer: PromptRenderer,
        vocab_size: int,
        config: EngineConfig,
        eos_ids: Sequence[int],
        eos_id: int | None,
        value: ExplicitValue,
    ) -> None:
        self._runners = runners
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._vocab_size = vocab_size
        self._max_num_rows = config.max_num_rows
        self._max_prompt_tokens = config.max_prompt_tokens
        self._eos_ids = eos_ids
        self._eos_id = eos_id
        self._value = value

    def create(
        self,
        prompts: Sequence[PromptInput],
        params: SearchParams | Sequence[SearchParams],
        seeds: Sequence[int] | None,
    ) -> list[LiveRequest]:
        """One request a prompt; `params` and `seeds` as of Engine.generate.

        Raises:
            InvalidParameterError, CapacityError: about any one of them; nothing has started then.
        """
        count = len(prompts)
        every = [params] * count if isinstance(params, SearchParams) else params
        if not isinstance(every, Sequence):
            raise InvalidParameterError("params", params, "must be SearchParams, or a list of them")
        if len(every) != count:
            raise InvalidParameterError("params", len(every), f"must be one, or {count}")
        if seeds is not None and not isinstance(seeds, Sequence | np.ndarray):
            raise InvalidParameterError("seeds", seeds, "must be a list of integers")
        if seeds is not None and len(seeds) != count:
            raise InvalidParameterError("seeds", len(seeds), f"must be {count}, one a prompt")
        requests = []
        for index, (prompt, p) in enumerate(zip(prompts, every, strict=True)):
            if not isinstance(p, SearchParams):
                raise InvalidParameterError("params", p, "must be SearchParams")
            if p.pool_size > self._max_num_rows:
                raise CapacityError(
                    f"the request needs beam_width * num_candidates = {p.pool_size} rows, "
                    f"max_num_rows is {self._max_num_rows}"
                )
            if seeds is not None:
                seed = _checked_seed(seeds[index])
            elif p.seed is None:
                seed = secrets.randbits(64)
            else:
                seed = derive_seed(p.seed, index) if isinstance(params, SearchParams) else p.seed
            self._check_params(p)
            rendered = self._renderer.render(prompt, _roles_of(p))
            if (
                self._value.kind == "text"
                and p.scorer == "explicit"
                and isinstance(prompt, Prompt)
                and prompt.value is not None
                and rendered["value"].text is None
            ):
                raise InvalidParameterError(
                    "prompts", prompt.value, "must be a text for value, which scores texts"
                )
            request = LiveRequest.create(p, rendered, seed, self._eos_ids, self._value)
            self._check_prompt(prompt, request)
            requests.append(request)
        return requests

    def _need_tokenizer(self, name: str, value: object) -> None:
        if self._tokenizer is None:
            raise InvalidParameterError(name, value, "need an engine with a tokenizer")

    def _check_params(self, p: SearchParams) -> None:
        roles = {*self._runners, *(() if self._value.kind == "none" else ("value",))}
        for name, wanted in (("guidance", p.guidance), ("scorer", p.scorer)):
            missing = [] if callable(wanted) else [r for r in GUIDES[wanted] if r not in roles]
            if missing:
                raise InvalidParameterError(
                    name, wanted, f"needs {' and '.join(missing)}, which this engine was not given"
                )
        if p.guidance == "explicit" and self._value.kind != "vocabulary":
            raise UnsupportedModelError(
                "guidance 'explicit' needs a value with a vocabulary head over the base model's "
                f"token ids; this engine's gives a {_KIND_NAMES[self._value.kind]}"
            )
        if p.stop:
            self._need_tokenizer("stop", p.stop)
        if callable(p.scorer) or (p.scorer == "explicit" and self._value.kind == "text"):
            self._need_tokenizer("scorer", p.scorer)
        elif self._eos_id is None and p.scorer != "none":
            for name in ("stop", "score_eos_on_truncation"):
                if getattr(p, name):
                    raise InvalidParameterError(
                        name,
                        getattr(p, name),
                        f"with scorer {p.scorer!r} needs a model with an end-of-text token",
                    )
        for token in p.stop_token_ids:
            if token >= self._vocab_size:
                raise InvalidParameterError(
                    "stop_token_ids", token, f"must be below {self._vocab_size}"
                )

    def _check_prompt(self, prompt: PromptInput, request: LiveRequest) -> None:
        max_tokens = request.params.max_tokens
        for role, ids in request.prompt_ids.items():
            if not len(ids):
                raise InvalidParameterError("prompts", prompt, f"must have a token for {role}")
            unknown = ids[(ids < 0) | (ids >= self._runners[role].num_input_ids)]
            if len(unknown):
                raise InvalidParameterError(
                    "prompts",
                    int(unknown[0]),
                    f"must be token ids of {role}, in [0, {self._runners[role].num_input_ids})",
                )
            most = self._max_prompt_tokens
            if most is not None and len(ids) > most:
                raise CapacityError(
                    f"the prompt has {len(ids)} tokens for {role}, max_prompt_tokens is {most}"
                )
            limit = self._runners[role].max_position
            if limit is not None and request.num_positions(role) > limit:
                raise CapacityError(
                    f"a prompt of {len(ids)} tokens and max_tokens {max_tokens} exceed the "
                    f"{limit} positions of {role}"
                )


def _roles_of(p: SearchParams) -> list[str]:
    """Roles that read the prompt: the base, and those that guide or score."""
    wanted = [p.guidance] if callable(p.scorer) else [p.guidance, p.scorer]
    return list(dict.fromkeys(["base", *(role for kind in wanted for role in GUIDES[kind])]))


def derive_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` among prompts that share one: 64 bits, index 0 keeps the seed
    itself.

    The finaliser of splitmix64 spreads the sum, so that neighbours in seed and index do not meet.
    """
    if index == 0:
        return seed
    x = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= _MASK64:
        raise InvalidParameterError("seeds", seed, "must be integers in [0, 2^64)")
    return int(seed)
