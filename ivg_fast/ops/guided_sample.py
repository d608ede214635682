# SPDX-License-Identifier: Apache-2.0
"""guided_sample: combine base, tuned and untuned logits, filter, draw a token and measure it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._cpu import sample_cpu
from ivg_fast.ops._sample_args import FloatParam, GuidedSample, IntParam, SampleArgs, normalise
from ivg_fast.ops.philox import IntArray, uniform

Backend = Literal["auto", "cpu", "triton", "torch"]
BACKENDS = ("auto", "cpu", "torch")


def _thresholds(z: Tensor, args: SampleArgs) -> Tensor:
    """float64[B, 1]: the smallest scaled logit that the filters keep. z: float64[B, V], scaled."""
    vocab_size = z.shape[1]
    ordered = z.sort(dim=1, descending=True).values
    k = torch.where(args.top_k > 0, args.top_k.clamp(max=vocab_size), vocab_size)
    top_k_threshold = ordered.gather(1, (k - 1)[:, None])
    mass = torch.where(ordered >= top_k_threshold, (ordered - ordered[:, :1]).exp(), 0.0)
    cumulative = mass.cumsum(1)
    wanted = args.top_p.double()[:, None] * cumulative[:, -1:]
    last = torch.searchsorted(cumulative, wanted).clamp(max=vocab_size - 1)
    top_p_threshold = torch.where(
        args.top_p[:, None] < 1, ordered.gather(1, last), torch.full_like(wanted, -torch.inf)
    )
    min_p_threshold = ordered[:, :1] + args.min_p.double()[:, None].log()
    limit = torch.maximum(torch.maximum(top_k_threshold, top_p_threshold), min_p_threshold)
    return torch.minimum(limit, ordered[:, :1])


def _sample_float64(args: SampleArgs) -> GuidedSample:
    rows = args.rows
    base = args.base[rows].double()
    row_max = torch.finfo(torch.float32).max
    bad = (base.isnan() | (base == torch.inf)).any(1)
    z = base
    reward = value = torch.zeros_like(base)
    if args.tuned is not None:
        tuned = args.tuned[rows].double()
        bad |= (tuned.isnan() | (tuned == torch.inf)).any(1)
        value = tuned
        excluded = tuned == -torch.inf
        if args.untuned is not None:
            untuned = args.untuned[rows].double()
            bad |= (untuned.isnan() | (untuned == torch.inf)).any(1)
            excluded |= untuned == -torch.inf
            value = tuned - untuned
            reward = value - (tuned.logsumexp(1) - untuned.logsumexp(1))[:, None]
        weight = args.weight.double()[:, None]
        steered = torch.where(excluded | (base == -torch.inf), -torch.inf, base + weight * value)
        z = torch.where(weight != 0, steered, base)
        bad |= (z > row_max).any(1)
        z = torch.where(z < -row_max, -torch.inf, z)
    if args.banned_ids.shape[1] and len(rows):
        counts = torch.zeros_like(z).scatter_add_(
            1, args.banned_ids.clamp(min=0), args.banned.double()
        )
        z = torch.where(counts > 0, -torch.inf, z)
    valid = ~bad & (z > -torch.inf).any(1)
    z = torch.where(valid[:, None], z, 0.0)

    is_greedy = args.temperature == 0
    temperature = torch.where(is_greedy, 1.0, args.temperature.double())[:, None]
    scaled = z / temperature
    threshold = torch.where(is_greedy[:, None], -torch.inf, _thresholds(scaled, args))
    kept = scaled >= threshold
    top = scaled.max(1, keepdim=True)
    mass = torch.where(kept, (scaled - top.values).exp(), 0.0)
    cumulative = mass.cumsum(1)
    u = uniform(args.seeds, args.candidate_ids, args.positions)[:, None]
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    # max() does not promise the first of equals.
    lowest = (scaled == top.values).int().argmax(1, keepdim=True)
    token = torch.where(is_greedy[:, None], lowest, drawn)
    logprob = scaled.gather(1, token) - top.values - cumulative[:, -1:].log()
    base_logprob = base.gather(1, token) - base.logsumexp(1, keepdim=True)

    def measured(values: Tensor) -> Tensor:
        return torch.where(valid, values.squeeze(1), torch.nan).float()

    return GuidedSample(
        token_ids=torch.where(valid, token.squeeze(1), -1),
        logprob=measured(logprob),
        base_logprob=measured(base_logprob),
        implicit_reward=measured(reward.gather(1, token)),
        value=measured(value.gather(1, token)),
        valid=valid,
    )


def guided_sample_ref(
    base: Tensor,
    tuned: Tensor | None = None,
    untuned: Tensor | None = None,
    *,
    weight: FloatParam = 1.0,
    temperature: FloatParam = 1.0,
    top_k: IntParam = 0,
    top_p: FloatParam = 1.0,
    min_p: FloatParam = 0.0,
    seeds: IntArray,
    candidate_ids: IntArray,
    positions: IntArray,
    logit_rows: IntArray | None = None,
    banned_ids: Tensor | np.ndarray | None = None,
    banned_until: IntParam | None = None,
) -> GuidedSample:
    """guided_sample in plain PyTorch, float64 inside: the oracle of the tests, backend "torch"."""
    return _sample_float64(
        normalise(
            base,
            tuned,
            untuned,
            weight=weight,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            candidate_ids=candidate_ids,
            positions=positions,
            logit_rows=logit_rows,
            banned_ids=banned_ids,
            banned_until=banned_until,
        )
    )


def guided_sample(
    base: Tensor,
    tuned: Tensor | None = None,
    untuned: Tensor | None = None,
    *,
    weight: FloatParam = 1.0,
    temperature: FloatParam = 1.0,
    top_k: IntParam = 0,
    top_p: FloatParam = 1.0,
    min_p: FloatParam = 0.0,
    seeds: IntArray,
    candidate_ids: IntArray,
    positions: IntArray,
    logit_rows: IntArray | None = None,
    banned_ids: Tensor | np.ndarray | None = None,
    banned_until: IntParam | None = None,
    backend: Backend = "auto",
) -> GuidedSample:
    """Draw one token a sample from the guided distribution, and measure it, in one pass.

    With row = logit_rows[i], in float32 arithmetic::

        z = base[row] + weight * (tuned[row] - untuned[row])
        z[banned_ids[i]] = -inf                         while positions[i] < banned_until[i]
        p = softmax(filters(z / temperature))           temperature 0: the largest z, lowest id
        u = uniform(seeds[i], candidate_ids[i], positions[i])
        token = first id whose cumulative p, in the order of ids, exceeds u
        logprob = log p[token]
        base_logprob = log_softmax(base[row])[token]
        implicit_reward = (log_softmax(tuned[row]) - log_softmax(untuned[row]))[token]
        value = (tuned[row] - untuned[row])[token]

    Filters, in this order: top-k keeps all entries >= the k-th largest; top-p, renormalised after
    top-k, keeps the smallest set {p >= threshold} whose mass is >= top_p, with all ties; min-p
    keeps p >= min_p * max p. The largest entry always stays.

    A token that is -inf in base is never drawn, nor one that is -inf in tuned or in untuned (or in
    both) where the weight is not 0. A weight of exactly 0 samples from base alone and still
    measures the pair. A row with NaN or +inf in a given tensor, with a combined logit beyond
    float32, or with nothing left to draw gives valid=False and token -1; other rows do not notice.

    Args:
        base: float32, bfloat16 or float16 [R, V], V >= 2; rows may be strided, columns not.
        tuned: like base, of any of these dtypes; without `untuned`, z = base + weight * tuned.
        untuned: like tuned.
        weight: one number or [B], float32 inside; may be negative.
        temperature: one number or [B]; 0 is greedy.
        top_k: one int or [B]; 0 or -1: no limit.
        top_p: one number or [B], in (0, 1]; 1: no limit.
        min_p: one number or [B], in [0, 1]; 0: no limit.
        seeds: 64-bit integers [B] or one int; an int64 tensor holds unsigned values by its bits.
        candidate_ids: non-negative integers [B] or one int.
        positions: the 0-based response index of the token to be drawn, [B] or one int.
        logit_rows: the row that each sample draws from, [B]; None: B = R, in order.
        banned_ids: token ids [B, M] that may not be drawn, -1 for none.
        banned_until: [B] or one int, see above; None: at every position.
        backend: "cpu" (C++), "triton", "torch" (the reference), or "auto", by base's device.

    Index arrays may be tensors or numpy arrays. Values are checked where they are on the CPU; those
    in device memory are not read.

    Returns:
        GuidedSample. The same inputs give the same ids, whatever the other samples are.

    Raises:
        InvalidParameterError: names the parameter and the value.
    """
    if backend == "auto":
        backend = "cpu" if base.is_cpu else "torch"
    if backend == "cpu":
        return sample_cpu(
            *(base, tuned, untuned, weight, temperature, top_k, top_p, min_p),
            *(seeds, candidate_ids, positions, logit_rows, banned_ids, banned_until),
        )
    if backend != "torch":
        raise InvalidParameterError("backend", backend, f"must be one of {', '.join(BACKENDS)}")
    with torch.no_grad():
        return guided_sample_ref(
            base,
            tuned,
            untuned,
            weight=weight,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            candidate_ids=candidate_ids,
            positions=positions,
            logit_rows=logit_rows,
            banned_ids=banned_ids,
            banned_until=banned_until,
        )
