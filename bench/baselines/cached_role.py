# SPDX-License-Identifier: Apache-2.0
"""A HF model on its own KV tensors, with the fastest modules of stock PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines.fused_modules import use_fused_modules
from bench.baselines.packed_linear import PackedLinear, can_pack, use_packed_modules
from bench.baselines.step_graphs import StepGraphs
from bench.baselines.tree_cache import TreeCache, cache_shape

# torch.compile would go on in eager mode past 8 shapes of all roles together, without a word.
_MAX_COMPILED_SHAPES = 256


class CachedRole:
    """A HF model on a TreeCache.

    Args:
        model: a private view, on a device and in a dtype; its modules may be replaced.
        head_weight: [V, H] where `model` is a backbone without a head.
        value_weight: [V, H], a second head on the backbone of `model`; its forwards then give the
            hidden states, too.
        use_graphs: steps at constant shapes run as CUDA graphs.
        compile_backend: and through torch.compile with this backend beforehand; None: they do not.
    """

    def __init__(
        self,
        model: nn.Module,
        head_weight: Tensor | None,
        use_graphs: bool,
        *,
        value_weight: Tensor | None = None,
        compile_backend: str | None = None,
    ) -> None:
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.model = model
        self.head_weight, self.value_weight = head_weight, value_weight
        self._head: nn.Module | None = None
        is_packed = can_pack(self.device, self.dtype)
        if is_packed:
            use_packed_modules(model)
        elif self.device.type == "cuda":
            use_fused_modules(model)
        if head_weight is not None:
            self._head = nn.Linear(*head_weight.shape[::-1], bias=False, device="meta")
            self._head.weight = nn.Parameter(head_weight, requires_grad=False)
            if is_packed:
                self._head = PackedLinear(head_weight, None)
        elif value_weight is not None:
            self._head = model.get_output_embeddings()
        self.cache: TreeCache
        self._buffers: list[Tensor] = []
        self._forward: Any = self.logits
        self._is_compiled = compile_backend is not None
        if compile_backend is not None:
            self._forward = torch.compile(self.logits, backend=compile_backend, dynamic=False)
        self._graphs = StepGraphs(self._at_slots) if use_graphs else None

    def open_cache(self, num_rows: int, max_rows: int, num_slots: int) -> None:
        """An empty cache; memory is kept from one batch to the next."""
        shape = cache_shape(self.model, max_rows, num_slots)
        if not self._buffers or self._buffers[0].shape != shape:
            self.drop_cache()
            num_buffers = 2 * self.model.config.get_text_config().num_hidden_layers
            self._buffers = [
                torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(num_buffers)
            ]
        self.cache = TreeCache(self._buffers, num_rows)

    def drop_cache(self) -> None:
        """Gives the memory back."""
        if self._graphs is not None:
            self._graphs.clear()
        self._buffers = []
        self.cache = TreeCache([], 0)

    def logits(
        self, ids: Tensor, positions: Tensor, mask: Tensor, keep: int = 0
    ) -> tuple[Tensor, ...]:
        """float32 [A, q, V] for ids [A, q], or its last `keep`; writes the cache at `start`. With a
        second head, the hidden states [A, q, H] as well."""
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        options |= {"attention_mask": mask, "position_ids": positions}
        if self._head is None:
            return (self.model(ids, logits_to_keep=keep, **options).logits.float(),)
        backbone = self.model if self.head_weight is not None else self.model.base_model
        hidden = backbone(ids, **options).last_hidden_state[:, -keep:]
        logits = self._head(hidden).float()
        return (logits,) if self.value_weight is None else (logits, hidden)

    def step_at_constant_shape(
        self, ids: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        """`logits` with attention over all slots: `mask` is [A, 1, q, slots]."""
        first = self.cache.start
        slots = torch.arange(first, first + ids.shape[1], device=self.device)
        if self._graphs is None:
            return self._at_slots(ids, positions, mask, slots)
        # The next replay overwrites its outputs.
        return tuple(x.clone() for x in self._graphs(ids, positions, mask, slots))

    def _at_slots(
        self, ids: Tensor, positions: Tensor, mask: Tensor, slots: Tensor
    ) -> tuple[Tensor, ...]:
        # Where it starts is in `slots` alone: a number would be another graph for each step.
        self.cache.slots, self.cache.start = slots, 0
        try:
            if not self._is_compiled:
                return self._forward(ids, positions, mask)
            with torch._dynamo.config.patch(
                recompile_limit=_MAX_COMPILED_SHAPES, fail_on_recompile_limit_hit=True
            ):
                return self._forward(ids, positions, mask)
        finally:
            self.cache.slots = None

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """[A, q, H] for ids [A, q]; writes the cache at its `start`."""
        return self.model.base_model(
            ids,
            past_key_values=self.cache,
            use_cache=True,
            attention_mask=mask,
            position_ids=positions,
        ).last_hidden_state
