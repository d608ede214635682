# SPDX-License-Identifier: Apache-2.0
"""A decoder's forward through torch.compile, paged attention included."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from ivg_fast.errors import UnsupportedModelError


def compiled_forward(network: torch.nn.Module, role: str) -> Callable[..., Any]:
    """`network(...)` as one graph, whatever the number of tokens; compiled when first called.

    Attention is a single operator of the graph (see `attention.attend_op`). torch makes another
    graph where there is one token, or one row of logits: four at most.

    Raises (when called):
        UnsupportedModelError: the model has code that no one graph can hold.
    """

    def forward(**inputs: Any) -> Any:
        return network(**inputs)

    # torch.compile counts the graphs of a code object, and stops at eight; each network has its
    # own.
    own = types.FunctionType(
        forward.__code__.replace(co_name=f"forward_{role}"),
        forward.__globals__,
        closure=forward.__closure__,
    )
    run = torch.compile(own, dynamic=True, fullgraph=True)

    def call(**inputs: Any) -> Any:
        try:
            return run(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            kind = type(network).__name__
            raise UnsupportedModelError(f"{role}: {kind} cannot be compiled: {reason}") from error

    return call
