# SPDX-License-Identifier: Apache-2.0
"""Checks and the normal form of the arguments of guided_sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.philox import IntArray, as_int64

FloatParam = Tensor | np.ndarray | float
IntParam = Tensor | np.ndarray | int
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Below this a temperature's reciprocal comes near the end of float32.
MIN_TEMPERATURE = 1e-20


class GuidedSample(NamedTuple):
    """What guided_sample returns, one entry a sample.

    Attributes:
        token_ids: int64[B]; -1 where `valid` is False.
        logprob: float32[B], under the distribution sampled (after temperature, bans and filters;
            at temperature 0 under softmax(z)). NaN where `valid` is False, as the next three.
        base_logprob: float32[B], log_softmax(base) at temperature 1.
        implicit_reward: float32[B], log pi_tuned - log pi_untuned; 0 without a pair.
        value: float32[B], tuned - untuned as given; tuned alone without untuned; 0 without tuned.
        valid: bool[B].
    """

    token_ids: Tensor
    logprob: Tensor
    base_logprob: Tensor
    implicit_reward: Tensor
    value: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class SampleArgs:
    """The arguments in one form, for B samples from R rows of V logits.

    A sampling parameter is a number or a tensor [B] (float32, top_k int64); the index arrays are
    int64 [B], banned_ids int64 [B, M]. Every tensor is on the device of the logits.
    """

    base: Tensor
    tuned: Tensor | None
    untuned: Tensor | None
    num_samples: int
    weight: Tensor | float
    temperature: Tensor | float
    top_k: Tensor | int
    top_p: Tensor | float
    min_p: Tensor | float
    seeds: Tensor
    candidate_ids: Tensor
    positions: Tensor
    logit_rows: Tensor | None
    banned_ids: Tensor | None
    banned_until: Tensor | None


# The values that a parameter may have. The rules hold for numbers and for tensors.
_WORD = (lambda x: (x >= 0) & (x < 2**32), "must be in [0, 2^32)")
_RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight": (lambda x: x - x == 0, "must be finite"),
    "temperature": (
        lambda x: (x - x == 0) & ((x == 0) | (x >= MIN_TEMPERATURE)),
        f"must be 0 (greedy) or finite and at least {MIN_TEMPERATURE}",
    ),
    "top_k": (lambda x: x >= -1, "must be positive, or 0 or -1 for no limit"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "must be in (0, 1]"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "must be in [0, 1]"),
    "candidate_ids": _WORD,
    "positions": _WORD,
}


def check_logits(
    name: str, logits: Tensor, base: Tensor | None = None, *, base_name: str = "base"
) -> None:
    """Raise unless `logits` is [R, V] in a supported dtype, beside `base` of the same shape."""
    if not isinstance(logits, Tensor):
        raise InvalidParameterError(name, type(logits).__name__, "must be a torch.Tensor")
    if base is not None and logits.shape != base.shape:
        requirement = f"must have the shape of {base_name}, {tuple(base.shape)}"
        raise InvalidParameterError(name, tuple(logits.shape), requirement)
    if logits.dim() != 2:
        raise InvalidParameterError(name, tuple(logits.shape), "must have shape [rows, vocabulary]")
    if logits.shape[1] < 2:
        raise InvalidParameterError(name, tuple(logits.shape), "must have two columns or more")
    if logits.dtype not in LOGIT_DTYPES:
        raise InvalidParameterError(name, logits.dtype, "must be float32, bfloat16 or float16")
    if logits.stride(1) != 1:
        raise InvalidParameterError(name, logits.stride(), "must have columns of stride 1")
    if base is not None and logits.device != base.device:
        raise InvalidParameterError(
            name, logits.device, f"must be on {base.device} like {base_name}"
        )


def per_sample(
    name: str,
    values: IntArray | FloatParam,
    num_samples: int,
    device: torch.device,
    *,
    floating: bool = False,
) -> Tensor:
    """`values` as float32 (`floating`) or int64 of shape [num_samples]; one number serves all."""
    try:
        if floating:
            tensor = torch.as_tensor(values, dtype=torch.float32, device=device)
        else:
            if isinstance(values, Tensor) and (values.is_floating_point() or values.is_complex()):
                raise TypeError(f"{values.dtype} is no integer dtype")
            tensor = as_int64(values, device)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = "numbers" if floating else "integers"
        raise InvalidParameterError(name, values, f"must be {kind}") from error
    if tensor.dim() == 0:
        return tensor.expand(num_samples)
    if tensor.shape != (num_samples,):
        requirement = f"must be one number or have shape ({num_samples},)"
        raise InvalidParameterError(name, tuple(tensor.shape), requirement)
    return tensor


def _require(name: str, values: Tensor, rule: Callable[[Tensor], Tensor], requirement: str) -> None:
    """Raise where a value breaks the rule. Tensors of a device are not looked at."""
    if values.device.type == "cpu":
        is_good = rule(values)
        if not bool(is_good.all()):
            raise InvalidParameterError(name, values[~is_good][0].item(), requirement)


def _parameter(
    name: str, values: FloatParam | IntParam, num_samples: int, device: torch.device
) -> Any:
    """A sampling parameter as a number or as a tensor [num_samples], its values checked."""
    rule, requirement = _RULES[name]
    is_integer = name == "top_k"
    if isinstance(values, int | np.integer) or (
        isinstance(values, float | np.floating) and not is_integer
    ):
        number = int(values) if is_integer else float(values)
        if not rule(number):
            raise InvalidParameterError(name, number, requirement)
        return number
    tensor = per_sample(name, values, num_samples, device, floating=not is_integer)
    _require(name, tensor, rule, requirement)
    return tensor


def check_rows(logit_rows: IntArray, logits: Tensor) -> Tensor:
    """The row that each sample reads, int64 [B]."""
    num_rows, device = logits.shape[0], logits.device
    if isinstance(logit_rows, int) or getattr(logit_rows, "ndim", 1) != 1:
        raise InvalidParameterError("logit_rows", logit_rows, "must have one dimension")
    rows = per_sample("logit_rows", logit_rows, len(logit_rows), device)
    requirement = f"must be in [0, {num_rows})"
    _require("logit_rows", rows, lambda x: (x >= 0) & (x < num_rows), requirement)
    return rows


def check_token_ids(token_ids: IntArray, num_tokens: int, logits: Tensor) -> Tensor:
    """Ids of given tokens, int64 [num_tokens]."""
    tokens = per_sample("token_ids", token_ids, num_tokens, logits.device)
    vocab_size = logits.shape[1]
    requirement = f"must be in [0, {vocab_size})"
    _require("token_ids", tokens, lambda x: (x >= 0) & (x < vocab_size), requirement)
    return tokens


def _banned(
    banned_ids: Tensor | np.ndarray | None,
    banned_until: IntParam | None,
    num_samples: int,
    base: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    if banned_ids is None:
        if banned_until is not None:
            raise InvalidParameterError("banned_until", banned_until, "needs banned_ids")
        return None, None
    ids = as_int64(banned_ids, base.device)
    if ids.dim() != 2 or ids.shape[0] != num_samples:
        requirement = f"must have shape ({num_samples}, M)"
        raise InvalidParameterError("banned_ids", tuple(ids.shape), requirement)
    vocab_size = base.shape[1]
    requirement = f"must be in [-1, {vocab_size}), -1 for none"
    _require("banned_ids", ids, lambda x: (x >= -1) & (x < vocab_size), requirement)
    if banned_until is None:
        return ids, None
    return ids, per_sample("banned_until", banned_until, num_samples, base.device)


def normalise(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    *,
    weight: FloatParam,
    temperature: FloatParam,
    top_k: IntParam,
    top_p: FloatParam,
    min_p: FloatParam,
    seeds: IntArray,
    candidate_ids: IntArray,
    positions: IntArray,
    logit_rows: IntArray | None,
    banned_ids: Tensor | np.ndarray | None,
    banned_until: IntParam | None,
) -> SampleArgs:
    """Check everything that can be checked without a device read, and bring it to one form.

    Raises:
        InvalidParameterError: names the parameter and the value.
    """
    check_logits("base", base)
    if tuned is not None:
        check_logits("tuned", tuned, base)
    if untuned is not None:
        if tuned is None:
            raise InvalidParameterError("untuned", "a tensor", "needs tuned")
        check_logits("untuned", untuned, base)
    device = base.device
    rows = None if logit_rows is None else check_rows(logit_rows, base)
    num_samples = base.shape[0] if rows is None else len(rows)

    def parameter(name: str, values: FloatParam | IntParam) -> Any:
        return _parameter(name, values, num_samples, device)

    def indices(name: str, values: IntArray) -> Tensor:
        tensor = per_sample(name, values, num_samples, device)
        if name in _RULES:
            rule, requirement = _RULES[name]
            _require(name, tensor, rule, requirement)
        return tensor

    ids, until = _banned(banned_ids, banned_until, num_samples, base)
    return SampleArgs(
        base=base,
        tuned=tuned,
        untuned=untuned,
        num_samples=num_samples,
        weight=parameter("weight", weight),
        temperature=parameter("temperature", temperature),
        top_k=parameter("top_k", top_k),
        top_p=parameter("top_p", top_p),
        min_p=parameter("min_p", min_p),
        seeds=indices("seeds", seeds),
        candidate_ids=indices("candidate_ids", candidate_ids),
        positions=indices("positions", positions),
        logit_rows=rows,
        banned_ids=ids,
        banned_until=until,
    )
