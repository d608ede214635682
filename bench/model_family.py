# SPDX-License-Identifier: Apache-2.0
"""Models of well-known shapes on one set of weights, run by the engine and by both baselines."""

from __future__ import annotations

import gc

import torch

from bench.baselines import ReferenceStyleIVG, TunedPyTorchIVG, ValueModel
from bench.baselines.common import private_view
from bench.model_shapes import FAMILIES, build, value_head
from ivg_fast import Engine, EngineConfig, SearchParams
from ivg_fast.models.value_head import ValueHeadModel
from ivg_fast.ops.kv_cache import BLOCK_SIZE

WEIGHT = 1.0
# W*K -> (W, K)
SEARCHES = {1: (1, 1), 4: (2, 2), 16: (4, 4), 64: (8, 8)}


def request(family: str, num_candidates: int, max_tokens: int) -> SearchParams:
    """IVG at W*K = `num_candidates`, one of SEARCHES; at 1 there is nothing to select: EFT."""
    common = {"max_tokens": max_tokens, "guidance_weight": WEIGHT, "temperature": 0.7}
    if num_candidates == 1:
        return SearchParams.eft(**common, ignore_eos=True)
    width, children = SEARCHES[num_candidates]
    return SearchParams.ivg(
        **common,
        ignore_eos=True,
        beam_width=width,
        num_candidates=children,
        chunk_length=FAMILIES[family].chunk_length,
    )


def needed_blocks(params: SearchParams, num_prompt: int) -> int:
    """KV blocks that a request reserves (the worst case of the scheduler's admission)."""

    def blocks(num_tokens: int) -> int:
        return -(-num_tokens // BLOCK_SIZE)

    prompt, pool = blocks(num_prompt), params.pool_size
    if params.chunk_length is None:
        return prompt + pool * blocks(params.max_tokens)
    chunk = blocks(BLOCK_SIZE - 1 + params.chunk_length)
    return prompt + params.beam_width * blocks(params.max_tokens) + pool * chunk


class ModelFamily:
    """Three models with random weights, and a value head on the trunk of `tuned`.

    Providers are made when they are wanted, and share the weights; the engine has views of the
    modules of its own, as it changes them.
    """

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        shapes = FAMILIES[name].roles
        self.models = {
            role: build(shape, device, dtype, seed)
            for seed, (role, shape) in enumerate(shapes.items())
        }
        # With its index: a view on "cuda" would be a copy of what lies on "cuda:0".
        self.device = next(self.models["base"].parameters()).device
        self.head = value_head(shapes["tuned"], device, dtype, seed=3)
        self.vocab_size = self.models["base"].config.vocab_size

    def prompt(self, num_tokens: int) -> list[int]:
        generator = torch.Generator().manual_seed(num_tokens)
        return torch.randint(3, self.vocab_size, (num_tokens,), generator=generator).tolist()

    def engine(self, max_candidates: int, num_prompt: int, max_tokens: int) -> Engine:
        """With room for one request of so many candidates, and no more memory than that takes."""
        requests = [request(self.name, wk, max_tokens) for wk in SEARCHES if wk <= max_candidates]
        num_blocks = max(needed_blocks(one, num_prompt) for one in requests) + 8
        config = EngineConfig(num_blocks=num_blocks, max_num_rows=max(8, max_candidates))
        views = {
            role: private_view(model, "sdpa", self.device, self.dtype)
            for role, model in self.models.items()
        }
        value = ValueHeadModel(views["tuned"].base_model, self.head)
        return Engine(views.pop("base"), value=value, config=config, **views)

    def baseline(self, name: str, *, compile: bool = False) -> ReferenceStyleIVG | TunedPyTorchIVG:
        """`reference_style` or `tuned_pytorch`, the latter at constant shapes on a CPU, too."""
        value = ValueModel(self.models["tuned"].base_model, self.head.weight)
        models = (*self.models.values(), value)
        if name == "reference_style":
            return ReferenceStyleIVG(*models, device=self.device, dtype=self.dtype)
        return TunedPyTorchIVG(
            *models,
            device=self.device,
            dtype=self.dtype,
            use_constant_shapes=True,
            compile=compile,
        )


def free_memory(device: str) -> None:
    """Gives back what nobody refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
