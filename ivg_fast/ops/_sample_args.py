# SPDX-License-Identifier: Apache-2.0
"""Checks and the normal form of the arguments of guided_sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    """The arguments as tensors on the logits' device: R rows of V logits, B samples.

    The sampling parameters are float32 (top_k int64) of length B; `banned` is bool[B, M] beside
    `banned_ids`, already decided by position.
    """

    base: Tensor
    tuned: Tensor | None
    untuned: Tensor | None
    weight: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    candidate_ids: Tensor
    positions: Tensor
    rows: Tensor
    banned_ids: Tensor
    banned: Tensor


def check_logits(name: str, logits: Tensor, base: Tensor | None = None) -> None:
    """Raise unless `logits` is [R, V] in a supported dtype, beside `base` of the same shape."""
    if not isinstance(logits, Tensor):
        raise InvalidParameterError(name, type(logits).__name__, "must be a torch.Tensor")
    if base is not None and logits.shape != base.shape:
        requirement = f"must have the shape of base, {tuple(base.shape)}"
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
        raise InvalidParameterError(name, logits.device, f"must be on {base.device} like base")


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


def _require(name: str, values: Tensor, is_good: Tensor, requirement: str) -> None:
    if not bool(is_good.all()):
        raise InvalidParameterError(name, values[~is_good][0].item(), requirement)


def check_values(args: SampleArgs) -> None:
    """Raise where a value is out of range. Only for tensors of the CPU: it reads them."""
    weight, temperature, top_p, min_p = args.weight, args.temperature, args.top_p, args.min_p
    _require("weight", weight, weight.isfinite(), "must be finite")
    _require(
        "temperature",
        temperature,
        temperature.isfinite() & ((temperature == 0) | (temperature >= MIN_TEMPERATURE)),
        f"must be 0 (greedy) or finite and at least {MIN_TEMPERATURE}",
    )
    _require("top_k", args.top_k, args.top_k >= -1, "must be positive, or 0 or -1 for no limit")
    _require("top_p", top_p, (top_p > 0) & (top_p <= 1), "must be in (0, 1]")
    _require("min_p", min_p, (min_p >= 0) & (min_p <= 1), "must be in [0, 1]")
    for name in ("candidate_ids", "positions"):
        values = getattr(args, name)
        _require(name, values, (values >= 0) & (values < 2**32), "must be in [0, 2^32)")
    num_rows, vocab_size = args.base.shape
    in_range = (args.rows >= 0) & (args.rows < num_rows)
    _require("logit_rows", args.rows, in_range, f"must be in [0, {num_rows})")
    in_range = (args.banned_ids >= -1) & (args.banned_ids < vocab_size)
    _require("banned_ids", args.banned_ids, in_range, f"must be in [-1, {vocab_size}), -1 for none")


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
    if logit_rows is None:
        num_samples = base.shape[0]
        rows = torch.arange(num_samples, device=device)
    else:
        if isinstance(logit_rows, int) or (isinstance(logit_rows, Tensor) and logit_rows.dim() != 1):
            raise InvalidParameterError("logit_rows", logit_rows, "must have one dimension")
        rows = per_sample("logit_rows", logit_rows, len(logit_rows), device)
        num_samples = rows.shape[0]

    def floats(name: str, values: FloatParam) -> Tensor:
        return per_sample(name, values, num_samples, device, floating=True)

    def integers(name: str, values: IntArray) -> Tensor:
        return per_sample(name, values, num_samples, device)

    position_tensor = integers("positions", positions)
    if banned_ids is None:
        if banned_until is not None:
            raise InvalidParameterError("banned_until", banned_until, "needs banned_ids")
        ids = torch.empty(num_samples, 0, dtype=torch.int64, device=device)
        banned = torch.empty_like(ids, dtype=torch.bool)
    else:
        ids = as_int64(banned_ids, device)
        if ids.dim() != 2 or ids.shape[0] != num_samples:
            requirement = f"must have shape ({num_samples}, M)"
            raise InvalidParameterError("banned_ids", tuple(ids.shape), requirement)
        banned = ids >= 0
        if banned_until is not None:
            banned &= (position_tensor < integers("banned_until", banned_until))[:, None]
    args = SampleArgs(
        base=base,
        tuned=tuned,
        untuned=untuned,
        weight=floats("weight", weight),
        temperature=floats("temperature", temperature),
        top_k=integers("top_k", top_k),
        top_p=floats("top_p", top_p),
        min_p=floats("min_p", min_p),
        seeds=integers("seeds", seeds),
        candidate_ids=integers("candidate_ids", candidate_ids),
        positions=position_tensor,
        rows=rows,
        banned_ids=ids,
        banned=banned,
    )
    if device.type == "cpu":
        check_values(args)
    return args
