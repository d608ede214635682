# SPDX-License-Identifier: Apache-2.0
"""A HF model on its own KV tensors, with the fastest modules of stock PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines.packed_linear import PackedLinear, can_pack, use_packed_modules
from bench.baselines.tree_cache import TreeCache, cache_shape


class CachedRole:
    """A HF model on a TreeCache.

    Args:
        model: a private view, on a device and in a dtype; its modules may be replaced.
        head_weight: [V, H] where `model` is a backbone without a head.
        use_graphs: decode steps run at constant shapes under torch.compile with CUDA graphs.
    """

    def __init__(self, model: nn.Module, head_weight: Tensor | None, use_graphs: bool) -> None:
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.model = model
        self.head_weight = head_weight
        self._head: nn.Module | None = None
        is_packed = can_pack(self.device, self.dtype)
        if is_packed:
            use_packed_modules(model)
        if head_weight is not None:
            self._head = nn.Linear(*head_weight.shape[::-1], bias=False, device="meta")
            self._head.weight = nn.Parameter(head_weight, requires_grad=False)
            if is_packed:
                self._head = PackedLinear(head_weight, None)
        self.cache: TreeCache
        self._buffers: list[Tensor] = []
        self._step: Callable[..., Tensor] = self.logits
        if use_graphs:
            self._step = torch.compile(self.logits, mode="reduce-overhead", dynamic=False)

    def open_cache(self, num_rows: int, max_rows: int, num_slots: int) -> None:
        """An empty cache; memory is kept from one batch to the next."""
        shape = cache_shape(self.model, max_rows, num_slots)
        if not self._buffers or self._buffers[0].shape != shape:
            num_buffers = 2 * self.model.config.get_text_config().num_hidden_layers
            self._buffers = [
                torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(num_buffers)
            ]
            for buffer in self._buffers:
                torch._dynamo.mark_static_address(buffer)
        self.cache = TreeCache(self._buffers, num_rows)

    def logits(self, ids: Tensor, positions: Tensor, mask: Tensor, keep: int = 0) -> Tensor:
        """float32 [A, q, V] for ids [A, q], or its last `keep`; writes the cache at `start`."""
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        options |= {"attention_mask": mask, "position_ids": positions}
        if self._head is None:
            return self.model(ids, logits_to_keep=keep, **options).logits.float()
        hidden = self.model(ids, **options).last_hidden_state
        return self._head(hidden[:, -keep:]).float()

    def step_at_constant_shape(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`logits` with attention over all slots: `mask` is [A, 1, q, slots]."""
        first = self.cache.start
        self.cache.slots = torch.arange(first, first + ids.shape[1], device=self.device)
        # The next replay of a graph overwrites its output.
        logits = self._step(ids, positions, mask).clone()
        self.cache.slots = None
        return logits

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """[A, q, H] for ids [A, q]; writes the cache at its `start`."""
        return self.model.base_model(
            ids,
            past_key_values=self.cache,
            use_cache=True,
            attention_mask=mask,
            position_ids=positions,
        ).last_hidden_state
