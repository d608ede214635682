# SPDX-License-Identifier: Apache-2.0
"""The attention function that puts a Hugging Face decoder on the paged KV cache.

`transformers` calls it once a layer with the rotated queries, keys and values of all packed tokens.
The batch reaches it through a context variable instead of keyword arguments, because some models do
not hand unknown keywords down to their layers. A context variable belongs to one thread, so engines
in several threads cannot see each other's batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ivg_fast.errors import UnsupportedModelError
from ivg_fast.models.batch import ForwardBatch, StepBatch
from ivg_fast.ops.kv_cache import write_key_value
from ivg_fast.ops.paged_attention import paged_attention_prepared

ATTENTION_NAME = "ivg_paged"

# What some models hand to attention and the paged cache has no answer to.
_UNSERVED_KEYWORDS = ("position_bias", "indices", "block_indices", "sinks", "cache")

# Tells "no window" (None) from "the model does not say" (absent).
_ABSENT: Any = object()


class _Context(Protocol):
    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor: ...


_CURRENT: ContextVar[_Context | None] = ContextVar("ivg_fast_attention", default=None)


@contextmanager
def attention_context(context: _Context) -> Iterator[None]:
    """Makes `context` the one that attention in this thread uses, until the block ends."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
    if torch.compiler.is_compiling():
        return _traced(module, query, key, value, **kwargs), None
    return _current().attend(module, query, key, value, attention_mask, **kwargs), None


def _current() -> _Context:
    context = _CURRENT.get()
    if context is None:
        raise RuntimeError(
            f"attention {ATTENTION_NAME!r} works only inside a ModelRunner; close the runner, or "
            "call model.set_attn_implementation('sdpa'), to use the model by itself"
        )
    return context


def paged_context() -> PagedContext | None:
    """The current context if it is one of packed tokens on the cache, outside of a graph."""
    context = None if torch.compiler.is_compiling() else _CURRENT.get()
    return context if type(context) is PagedContext else None


def _traced(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = _ABSENT,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """The call of attention as torch.compile sees it: one operator."""
    says_window = sliding_window is not _ABSENT
    return attend_op(
        query,
        key,
        value,
        cast(int, module.layer_idx),
        scaling,
        sliding_window if says_window else None,
        says_window,
        softcap,
        s_aux,
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is left of a module inside a graph."""

    layer_idx: int


@torch.library.custom_op("ivg_fast::attend", mutates_args=())
def attend_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer_idx: int,
    scaling: float | None,
    sliding_window: int | None,
    says_window: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the current context as an operator of a compiled graph.

    It also writes the pools, of which the graph knows nothing: no other operator reads a layer's
    pools, and an operator whose output is used runs once.
    """
    window = {"sliding_window": sliding_window} if says_window else {}
    module = cast(torch.nn.Module, _Layer(layer_idx))
    return _current().attend(
        module, query, key, value, None, scaling=scaling, softcap=softcap, s_aux=s_aux, **window
    )


@attend_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer_idx: int,
    scaling: float | None,
    sliding_window: int | None,
    says_window: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


AttentionInterface.register(ATTENTION_NAME, _attention_forward)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token, num_kv_heads keys of key_dim and values of value_dim; its
    queries are of num_heads."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(slots=True)
class LayerCache:
    """The KV pools of one layer, [num_blocks, Hkv, 16, D], and its window as the config has it."""

    key_pool: torch.Tensor
    value_pool: torch.Tensor
    sliding_window: int | None


class PagedContext:
    """Attention of one packed batch over the pools of one runner."""

    __slots__ = ("backend", "layers", "rows", "slot_mapping")

    def __init__(self, layers: list[LayerCache], batch: ForwardBatch | StepBatch) -> None:
        self.layers = layers
        self.slot_mapping = batch.slot_mapping
        self.backend: Any = batch.backend
        self.rows = batch.attention_rows()

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = _ABSENT,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Writes the new keys and values, then attends; other keywords were judged at load."""
        output = self.attend_tokens(
            cast(int, module.layer_idx),
            _by_token(query),
            _by_token(key),
            _by_token(value),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window=sliding_window,
            soft_cap=softcap,
            sinks=None if s_aux is None else s_aux.float(),
        )
        return output.unsqueeze(0)

    def attend_tokens(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = _ABSENT,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same of query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] -> [T, Hq, Dv]."""
        layer = self.layers[layer_idx]
        window = layer.sliding_window if sliding_window is _ABSENT else sliding_window
        write_key_value(
            *(key, value, layer.key_pool, layer.value_pool, self.slot_mapping),
            backend=self.backend,
        )
        return paged_attention_prepared(
            query,
            layer.key_pool,
            layer.value_pool,
            self.rows,
            scale=scale,
            sliding_window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            backend=self.backend,
        )


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] -> [T, H, D] with the last dimension contiguous, a view where it already is."""
    tokens = states[0].transpose(0, 1)
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


class ProbeContext:
    """Records what each layer asks of attention, and refuses what the cache cannot do."""

    def __init__(self) -> None:
        self.layer_shapes: dict[int, LayerShape] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Plain causal attention: the numbers do not matter here, the shapes do."""
        index = getattr(module, "layer_idx", None)
        if index is None or index in self.layer_shapes:
            raise UnsupportedModelError(
                f"{type(module).__name__} must have a layer_idx of its own, got {index!r}"
            )
        if attention_mask is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} makes an attention mask of its own"
            )
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{type(module).__name__} is not causal")
        for name in _UNSERVED_KEYWORDS:
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends with {name}, which the paged cache cannot do"
                )
        self.layer_shapes[index] = LayerShape(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            dtype=key.dtype,
        )
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        return output.transpose(1, 2)
