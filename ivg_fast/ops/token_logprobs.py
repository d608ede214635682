# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, without a temporary of the logits' size."""

from __future__ import annotations

import torch
from torch import Tensor

from ivg_fast.ops._backend import Backend, choose_backend
from ivg_fast.ops._cpu import check_device, try_token_logprobs
from ivg_fast.ops._sample_args import check_logits, check_rows, check_token_ids
from ivg_fast.ops._triton import token_logprobs_triton
from ivg_fast.ops.philox import IntArray


def token_logprobs(
    logits: Tensor,
    token_ids: IntArray,
    logit_rows: IntArray | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """log_softmax(logits[logit_rows[i]])[token_ids[i]], reading each row once.

    Args:
        logits: float32, bfloat16 or float16 [R, V], V >= 2; rows may be strided, columns not.
        token_ids: integers [N] in [0, V).
        logit_rows: the row of each token, [N]; None: N = R, in order. Runs of equal rows share the
            read.
        backend: "cpu" (C++), "triton", "torch" (the reference), or "auto", by the logits' device.

    Returns:
        float32[N]. -inf where the token's logit is -inf, NaN where the row has NaN or +inf or
        nothing finite.

    Raises:
        InvalidParameterError: names the parameter and the value. Ids and rows in device memory are
            not read, hence not checked.
    """
    return _dispatch(logits, None, token_ids, logit_rows, backend)


def pair_token_logprobs(
    tuned: Tensor,
    untuned: Tensor,
    token_ids: IntArray,
    logit_rows: IntArray | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """token_logprobs(tuned, ...) - token_logprobs(untuned, ...), in one pass: float32[N].

    Arguments and errors are those of token_logprobs; both tensors have one shape and may differ in
    dtype. The difference is rounded once. NaN where the token's logit is -inf in both.
    """
    return _dispatch(tuned, untuned, token_ids, logit_rows, backend)


def token_logprobs_ref(
    logits: Tensor, token_ids: IntArray, logit_rows: IntArray | None = None
) -> Tensor:
    """token_logprobs in plain PyTorch, float64 inside."""
    return _reference(logits, None, token_ids, logit_rows)


def pair_token_logprobs_ref(
    tuned: Tensor, untuned: Tensor, token_ids: IntArray, logit_rows: IntArray | None = None
) -> Tensor:
    """pair_token_logprobs in plain PyTorch, float64 inside."""
    return _reference(tuned, untuned, token_ids, logit_rows)


def _names(minus: Tensor | None) -> tuple[str, str]:
    return ("logits", "") if minus is None else ("tuned", "untuned")


def _normalise(
    logits: Tensor, minus: Tensor | None, token_ids: IntArray, logit_rows: IntArray | None
) -> tuple[Tensor, Tensor | None]:
    name, minus_name = _names(minus)
    check_logits(name, logits)
    if minus is not None:
        check_logits(minus_name, minus, logits, base_name=name)
    rows = None if logit_rows is None else check_rows(logit_rows, logits)
    num_tokens = logits.shape[0] if rows is None else len(rows)
    return check_token_ids(token_ids, num_tokens, logits), rows


def _reference(
    logits: Tensor, minus: Tensor | None, token_ids: IntArray, logit_rows: IntArray | None
) -> Tensor:
    tokens, given_rows = _normalise(logits, minus, token_ids, logit_rows)
    rows = slice(None) if given_rows is None else given_rows
    result = logits[rows].double().log_softmax(1).gather(1, tokens[:, None])
    if minus is not None:
        result -= minus[rows].double().log_softmax(1).gather(1, tokens[:, None])
    return result.squeeze(1).float()


def _dispatch(
    logits: Tensor,
    minus: Tensor | None,
    token_ids: IntArray,
    logit_rows: IntArray | None,
    backend: Backend,
) -> Tensor:
    chosen = choose_backend(backend, logits)
    if chosen == "cpu":
        result = try_token_logprobs(logits, minus, token_ids, logit_rows)
        if result is None:
            tokens, rows = _normalise(logits, minus, token_ids, logit_rows)
            check_device(_names(minus)[0], logits)
            result = try_token_logprobs(logits, minus, tokens, rows)
        if result is None:
            raise RuntimeError("the kernel declined arguments in their normal form")
        return result
    with torch.no_grad():
        if chosen == "torch":
            return _reference(logits, minus, token_ids, logit_rows)
        tokens, rows = _normalise(logits, minus, token_ids, logit_rows)
        return token_logprobs_triton(_names(minus)[0], logits, minus, tokens, rows)
