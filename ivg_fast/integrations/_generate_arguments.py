# SPDX-License-Identifier: Apache-2.0
"""What `model.generate` was asked for, as prompts and SearchParams, or the name of what cannot be.

By the time that a `custom_generate` callable runs, `generate` has merged its arguments, the model's
generation config and its own defaults into one GenerationConfig, and has made logits processors and
stopping criteria of it. So what rules a token is read off those lists: whatever is in them and is
not known here is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import SearchParams

# Processors and criteria that SearchParams says too, or that change no token.
_KNOWN = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "LogitNormalization",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "EosTokenCriteria",
}
# The argument of `generate` that a class was made of; others were given as they are.
_MADE_OF = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "TopHLogitsWarper": "top_h",
    "TypicalLogitsWarper": "typical_p",
    "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff",
    "WatermarkLogitsProcessor": "watermarking_config",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "StopStringCriteria": "stop_strings",
}
_MODES = {
    "contrastive_search": "penalty_alpha",
    "dola_generation": "dola_layers",
    "assisted_generation": "assistant_model",
    "constrained_beam_search": "constraints",
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# What generate hands to the model that has no meaning here, or was read before.
_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
}


def check_arguments(
    config: Any, processors: Sequence[Any], criteria: Sequence[Any], model_kwargs: Mapping[str, Any]
) -> None:
    """Raises InvalidParameterError about what this way of generating has not, by its name."""
    if config.num_beams is not None and config.num_beams > 1:
        raise InvalidParameterError(
            "num_beams", config.num_beams, "must be 1: the search is that of `search`"
        )
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise InvalidParameterError(_MODES.get(mode, mode), mode, "must not be asked for")
    for name in _OUTPUTS:
        if getattr(config, name, None):
            raise InvalidParameterError(name, True, "must be False: the engine keeps none")
    for kind, things in (("logits_processor", processors), ("stopping_criteria", criteria)):
        for thing in things:
            name = type(thing).__name__
            if name not in _KNOWN:
                made_of = _MADE_OF.get(name, kind)
                raise InvalidParameterError(
                    made_of, getattr(config, made_of, name), "must not be given with this search"
                )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InvalidParameterError("past_key_values", cache.get_seq_length(), "must be empty")
    for name, given in model_kwargs.items():
        if given is not None and name not in _MODEL_KWARGS:
            raise InvalidParameterError(name, type(given).__name__, "must not be given")


def search_params(
    search: SearchParams, config: Any, input_length: int, vocab_size: int, seed: int
) -> SearchParams:
    """`search`, with what `generate` was told in its place.

    What both have is generate's: length, sampling, ends of text. `search` leaves it at its default,
    or says the same.

    Args:
        search: as given.
        config: the prepared GenerationConfig.
        input_length: tokens of the padded prompts.
        vocab_size: ids that can be drawn; ends of text past them never are.
        seed: where `search` has none.

    Raises:
        InvalidParameterError: both say something, and not the same; or a value is impossible.
    """
    max_tokens = config.max_length - input_length
    if search.max_tokens != max_tokens:
        raise InvalidParameterError(
            "search.max_tokens",
            search.max_tokens,
            f"must be generate's max_new_tokens, {max_tokens}",
        )
    num_returned = config.num_return_sequences or 1
    told: dict[str, tuple[Any, Any, str]] = {  # field -> (default, what generate says, its words)
        "temperature": (1.0, _temperature(config), _spelt_temperature(config)),
        "min_tokens": (0, max(0, (config.min_length or 0) - input_length), "min_new_tokens"),
        "deadline_s": (None, config.max_time, "max_time"),
        "n": (1, num_returned, "num_return_sequences"),
    }
    if config.do_sample:
        told["top_k"] = (0, config.top_k or 0, "top_k")
        told["top_p"] = (1.0, 1.0 if config.top_p is None else config.top_p, "top_p")
        told["min_p"] = (0.0, config.min_p or 0.0, "min_p")
    changes: dict[str, Any] = {}
    for name, (default, said, words) in told.items():
        own = getattr(search, name)
        if own in (default, said):
            changes[name] = said
        elif said in (default, None) and name != "temperature":
            changes[name] = own
        else:
            raise InvalidParameterError(
                f"search.{name}", own, f"must be generate's {words}, {said}, or be left out"
            )
    if search.pool_size == 1 and search.scorer == "none":
        changes["num_candidates"] = num_returned  # independent samples, as generate draws them
    elif num_returned > search.pool_size:
        raise InvalidParameterError(
            "num_return_sequences", num_returned, f"must be at most W*K = {search.pool_size}"
        )
    if changes["temperature"] == 0 and search.pool_size > 1:
        raise InvalidParameterError(
            "do_sample", False, f"must be True with {search.pool_size} candidates"
        )
    ends = [] if search.ignore_eos else [i for i in end_ids(config) if i < vocab_size]
    return replace(
        search,
        **changes,
        seed=seed if search.seed is None else search.seed,
        ignore_eos=True,  # the ends of text are generate's, not the engine's
        stop_token_ids=sorted({*ends, *search.stop_token_ids}),
    )


def end_ids(config: Any) -> list[int]:
    """The ids that end a text, as generate has understood `eos_token_id`."""
    ends = config._eos_token_tensor
    return [] if ends is None else ends.reshape(-1).tolist()


def _temperature(config: Any) -> float:
    if not config.do_sample:
        return 0.0
    return 1.0 if config.temperature is None else config.temperature


def _spelt_temperature(config: Any) -> str:
    return "temperature" if config.do_sample else "temperature (do_sample=False)"


def unpadded(
    name: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> list[list[int]]:
    """The tokens of each row of [B, T] without the padding in front.

    Raises:
        InvalidParameterError: a mask that is not a row's end, of all ones.
    """
    if attention_mask is None:
        return input_ids.tolist()
    mask = attention_mask.bool()
    if mask.shape != input_ids.shape:
        raise InvalidParameterError(
            f"{name}attention_mask", tuple(mask.shape), f"must be {tuple(input_ids.shape)}"
        )
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InvalidParameterError(
            f"{name}attention_mask", "zeros behind ones", "must pad on the left alone"
        )
    return [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def check_positions(position_ids: torch.Tensor | None, prompts: Sequence[Sequence[int]]) -> None:
    """Raises InvalidParameterError about positions that are not 0, 1, 2, ... of each prompt."""
    if position_ids is None:
        return
    rows = position_ids.expand(len(prompts), -1)
    for row, prompt in zip(rows, prompts, strict=True):
        if row[len(row) - len(prompt) :].tolist() != list(range(len(prompt))):
            raise InvalidParameterError(
                "position_ids", row.tolist(), "must count each prompt's tokens from 0"
            )
