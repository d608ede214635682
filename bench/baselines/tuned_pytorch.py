# SPDX-License-Identifier: Apache-2.0
"""IVG as fast as plain PyTorch and transformers go.

The prompt is prefilled once; the base model's survivors forward their last token once for all
children; scorers keep their own caches and forward only what is new, a trunk's last token together
with its children's tokens; a value head on the trunk of the tuned guide reads the hidden states
that this guide has anyway; prompts run in one batch; one uniform a token; no inference outside the
stock HF decoder.

On a GPU: the steps of each model are CUDA graphs at constant shapes; attention is SDPA under the
tree mask with a group's heads folded into the queries, so that no key is repeated; norms and
activations are torch's fused ones; nothing waits for the device inside a chunk. With `compile` the
steps go through torch.compile before they are captured, which fuses the small kernels between the
matrix products, at minutes of compilation for each number of candidates.

Measured on a GPT-2-shaped family (base 6 x 384, guides and value 4 x 192, vocabulary 4,096;
W, K, L = 4, 4, 5; 50 tokens; float32; one thread of an AMD CPU with AVX-512 that others used too,
so CPU time, of few runs):

- siblings as queries of one row under a tree mask: attention of eight prompts 0.6 ms a layer,
  against 3.5 to 4 ms with a row a candidate (SDPA with or without a mask, matmul and softmax);
- oneDNN-packed linear layers and the fused GELU: 0.63 s a prompt instead of 0.86 s (one prompt),
  0.34 s instead of 0.59 s (eight). MKL's packed weights gained nothing;
- attention by matmul and softmax against SDPA, on the same rows: no difference within the noise;
- torch.compile of a guide's decode step: 3.4 ms against 4.6 ms with stock linear layers, 2.4 ms
  against 2.6 ms with packed ones (as an opaque operator), at 20 to 60 s of compilation a model: not
  used on the CPU. With the KV of all layers in one tensor it was slower than eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.baselines.cached_role import CachedRole
from bench.baselines.common import (
    BaselineResult,
    ValueModel,
    check_length,
    check_request,
    private_view,
)
from bench.baselines.fused_modules import attention_for
from bench.baselines.tree_search import TreeSearch
from ivg_fast.params import SearchParams


class TunedPyTorchIVG:
    """Guided chunk-level beam search, the strongest that plain PyTorch can do.

    Args:
        base: the model that is steered, a HF causal LM.
        tuned, untuned: the pair of the implicit value; None where no request uses it.
        value: the explicit value; None where no request uses it.
        eos_token_ids: ids that end a response.
        device, dtype: where and in which precision to run; weights are shared with the given models
            where these agree.
        max_candidates: candidates (W*K a prompt) that run in one batch at most, but at least one
            prompt.
        use_constant_shapes: decode steps attend over all slots, so that CUDA graphs can hold them;
            None: on a GPU only.
        compile: steps at constant shapes go through torch.compile.
    """

    def __init__(
        self,
        base: nn.Module,
        tuned: nn.Module | None = None,
        untuned: nn.Module | None = None,
        value: ValueModel | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_candidates: int = 256,
        use_constant_shapes: bool | None = None,
        compile: bool = False,
    ) -> None:
        if (tuned is None) != (untuned is None):
            raise ValueError("tuned and untuned must be given together")
        self.device = torch.device(device)
        is_cuda = self.device.type == "cuda"
        self._use_constant_shapes = is_cuda if use_constant_shapes is None else use_constant_shapes
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_candidates = max_candidates
        if compile and not self._use_constant_shapes:
            raise ValueError("compile needs use_constant_shapes")
        models = {"base": base, "tuned": tuned, "untuned": untuned}
        heads: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        if value is not None:
            models["value"] = value.backbone
            heads["value"] = value.head_weight.to(self.device, dtype)
            if tuned is not None and any(value.backbone is part for part in tuned.modules()):
                values["tuned"] = heads["value"]
        attention = attention_for(self.device)
        self._roles = {
            name: CachedRole(
                private_view(model, attention, self.device, dtype),
                heads.get(name),
                is_cuda,
                value_weight=values.get(name),
                compile_backend="inductor" if compile else None,
            )
            for name, model in models.items()
            if model is not None
        }

    def drop_caches(self) -> None:
        """Gives the memory of all caches and graphs back; the next request takes it again."""
        for role in self._roles.values():
            role.drop_cache()

    @torch.inference_mode()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SearchParams, seed: int = 0
    ) -> list[BaselineResult]:
        """The best response to each prompt; prompt i draws from a generator seeded with seed + i.

        Raises:
            ValueError: for a request that the models or this baseline cannot serve.
        """
        check_request(
            prompt_ids,
            params,
            has_pair="tuned" in self._roles,
            has_value="value" in self._roles,
        )
        for role in self._roles.values():
            check_length(role.model, max(map(len, prompt_ids)) + params.max_tokens)
        per_batch = max(1, self.max_candidates // params.pool_size)
        by_length = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
        results: dict[int, BaselineResult] = {}
        for first in range(0, len(by_length), per_batch):
            indices = by_length[first : first + per_batch]
            prompts = [prompt_ids[i] for i in indices]
            search = TreeSearch(
                self._roles,
                prompts,
                params,
                [seed + i for i in indices],
                self.eos_token_ids,
                self._use_constant_shapes,
            )
            results.update(zip(indices, search.search(), strict=True))
        return [results[i] for i in range(len(prompt_ids))]
