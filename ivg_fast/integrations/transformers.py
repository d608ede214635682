# SPDX-License-Identifier: Apache-2.0
"""Guided search behind `model.generate`, and token guidance inside of it.

    from ivg_fast.integrations.transformers import generate

    model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.7,
                   custom_generate=generate, tuned=tuned, untuned=untuned, value=value,
                   search=SearchParams.ivg(max_tokens=50))

What `generate` itself has (length, sampling, ends of text, number of sequences) is said there;
`search` says the rest: guidance, weight, scorer, W, K, L. Anything of `generate` that the engine
has not is refused by its name. A `custom_generate` callable cannot see the arguments `streamer`,
`tokenizer`, `assistant_model` and `synced_gpus` of `generate`, which drops them without a word; use
`token_streamer` and `text_tokenizer` here.

How stock `generate` computes (`use_cache`, `cache_implementation`, `compile_config`,
`prefill_chunk_size`, `disable_compile`) has no meaning here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput

from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError
from ivg_fast.integrations._engines import close_engines, engine_of
from ivg_fast.integrations._generate_arguments import (
    check_arguments,
    check_positions,
    search_params,
    unpadded,
)
from ivg_fast.integrations.logits_processor import GuidanceLogitsProcessor
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.prompts import derive_seed
from ivg_fast.rendering import Prompt

__all__ = ["GuidanceLogitsProcessor", "GuidedGenerateOutput", "close_engines", "generate"]

TokenStreamer = Callable[[int, list[int]], object]


@dataclass
class GuidedGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns under `return_dict_in_generate`: `sequences`, and beside them

    Attributes:
        requests: a RequestOutput a prompt, with scores and counters.
    """

    requests: list[RequestOutput] | None = None


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    search: SearchParams | None = None,
    tuned: nn.Module | None = None,
    untuned: nn.Module | None = None,
    value: Any = None,
    text_tokenizer: Any = None,
    role_inputs: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    token_streamer: TokenStreamer | Any = None,
    engine_config: EngineConfig | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GuidedGenerateOutput:
    """For `model.generate(..., custom_generate=generate, search=..., tuned=..., ...)`; see above.

    The engine of these models is made at the first call and kept on `model` (see `close_engines`);
    between calls the models are as they were. One thread at a time uses the engines of a model.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: what
            transformers calls it with. Prompts of several lengths are padded on the left.
        search: the search. Its `max_tokens` is generate's `max_new_tokens`; without a seed it draws
            one from torch's generator, so that `torch.manual_seed` repeats a call.
        tuned, untuned, value: as for an Engine.
        text_tokenizer: of `model`; for stop strings of `search` and for scorers that read texts.
        role_inputs: `input_ids` and `attention_mask` [B, T] by role ("tuned", "untuned", "value"),
            where a role reads another prompt than the base.
        token_streamer: called with (index of the prompt, tokens just decided of its best sequence);
            or a streamer of transformers, for a single prompt: `put` gets the prompt, then decided
            tokens, and `end` is called.
        engine_config: of the engine.

    Returns:
        What `generate` returns: i64 [B * num_return_sequences, T + longest response], each row its
        padded prompt and response, then the pad token; in a GuidedGenerateOutput with
        `return_dict_in_generate`. A prompt's rows are best first. Where its last pool holds fewer
        distinct responses than are to be returned, they are repeated in order.

    Raises:
        InvalidParameterError: an argument that cannot be, by the name that the caller knows.
        Exception: as Engine and Engine.generate raise.
    """
    config = generation_config
    if not isinstance(search, SearchParams):
        raise InvalidParameterError("search", search, "must be SearchParams")
    check_arguments(config, logits_processor or (), stopping_criteria or (), model_kwargs)
    num_returned = config.num_return_sequences or 1
    mask = model_kwargs.get("attention_mask")
    positions = model_kwargs.get("position_ids")
    # One row a prompt again: generate has repeated each for its sequences.
    mask, positions = (None if t is None else t[::num_returned] for t in (mask, positions))
    prompts = unpadded("", input_ids[::num_returned], mask)
    check_positions(positions, prompts)
    streamer = None if token_streamer is None else _Streamer(token_streamer, prompts, input_ids)
    with engine_of(
        model,
        tuned=tuned,
        untuned=untuned,
        value=value,
        tokenizer=text_tokenizer,
        config=engine_config,
    ) as engine:
        seed = int(torch.randint(2**63 - 1, ()))
        params = search_params(search, config, input_ids.shape[1], engine.vocab_size, seed)
        pad_id = _pad_id(config, params, len(prompts))
        asked = _by_role(prompts, role_inputs)
        if streamer is None:
            outputs = engine.generate(asked, params)
        else:
            outputs = _run(engine, asked, params, streamer.say)
            streamer.end()
    sequences = _sequences(input_ids, outputs, num_returned, pad_id)
    if config.return_dict_in_generate:
        return GuidedGenerateOutput(sequences=sequences, requests=outputs)
    return sequences


class _Streamer:
    """Says decided tokens to a function, or to a streamer of transformers."""

    def __init__(self, target: Any, prompts: Sequence[Any], input_ids: torch.Tensor) -> None:
        self._is_put = hasattr(target, "put")
        if not self._is_put and not callable(target):
            raise InvalidParameterError("token_streamer", target, "must be callable")
        if self._is_put and len(prompts) > 1:
            raise InvalidParameterError(
                "token_streamer", target, f"must be a function with {len(prompts)} prompts"
            )
        self._target = target
        if self._is_put:
            target.put(input_ids[:1].cpu())

    def say(self, index: int, tokens: list[int]) -> None:
        if self._is_put:
            self._target.put(torch.tensor(tokens))
        else:
            self._target(index, tokens)

    def end(self) -> None:
        if self._is_put:
            self._target.end()


def _pad_id(config: Any, params: SearchParams, num_prompts: int) -> int | None:
    pad = config._pad_token_tensor
    if pad is not None:
        return int(pad)
    can_differ = params.stop or params.stop_token_ids or params.deadline_s is not None
    if can_differ and num_prompts * params.n > 1:
        raise InvalidParameterError(
            "pad_token_id", None, "must be given: rows may differ in length"
        )
    return None


def _by_role(
    prompts: Sequence[list[int]], role_inputs: Mapping[str, Mapping[str, torch.Tensor]] | None
) -> list[Any]:
    if not role_inputs:
        return list(prompts)
    own: dict[str, list[list[int]]] = {}
    for role, inputs in role_inputs.items():
        if role not in ("tuned", "untuned", "value"):
            raise InvalidParameterError("role_inputs", role, "must be of tuned, untuned or value")
        ids = unpadded(f"role_inputs[{role!r}].", inputs["input_ids"], inputs.get("attention_mask"))
        if len(ids) != len(prompts):
            raise InvalidParameterError("role_inputs", len(ids), f"must be {len(prompts)} prompts")
        own[role] = ids
    return [
        Prompt(raw=ids, **{role: every[i] for role, every in own.items()})
        for i, ids in enumerate(prompts)
    ]


def _run(
    engine: Engine, prompts: Sequence[Any], params: SearchParams, say: TokenStreamer
) -> list[RequestOutput]:
    """Engine.generate, that says what is decided as soon as it is."""
    assert params.seed is not None
    outputs: dict[int, RequestOutput] = {}
    said: dict[int, int] = {}  # prompt -> tokens said
    live: dict[int, int] = {}  # request id -> prompt
    failure: BaseException | None = None
    waiting: Iterator[tuple[int, Any]] = iter(list(enumerate(prompts)))
    item = next(waiting, None)
    try:
        while failure is None and (item is not None or live):
            while item is not None and engine.has_room:
                index, prompt = item
                seed = derive_seed(params.seed, index)
                live[engine.add_request(prompt, params, seed=seed, is_streamed=True)] = index
                item = next(waiting, None)
            for request_id, output in engine.step():
                index = live.pop(request_id)
                if not isinstance(output, RequestOutput):
                    failure = failure or output
                    continue
                outputs[index] = output
                rest = output.outputs[0].token_ids[said.get(index, 0) :]
                if rest:
                    say(index, rest)
            for request_id, index in live.items():
                tokens = engine.take_decided(request_id)
                if tokens:
                    said[index] = said.get(index, 0) + len(tokens)
                    say(index, tokens)
    finally:
        for request_id in live:
            engine.abort(request_id)
        while engine.has_unfinished:
            engine.step()
    if failure is not None:
        raise failure
    return [outputs[i] for i in range(len(prompts))]


def _sequences(
    input_ids: torch.Tensor, outputs: Sequence[RequestOutput], num_returned: int, pad_id: int | None
) -> torch.Tensor:
    responses = []
    for output in outputs:
        own = [candidate.token_ids for candidate in output.outputs]
        responses += [own[i % len(own)] for i in range(num_returned)]
    width = max(map(len, responses))
    rows = [[*ids, *[pad_id] * (width - len(ids))] for ids in responses]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new.view(len(rows), width)], dim=1)
