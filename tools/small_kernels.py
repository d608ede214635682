# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel once, on small ragged shapes, against plain PyTorch: what the sanitizers run.

    python tools/small_kernels.py [--device cuda|cpu]     cpu: with TRITON_INTERPRET=1

Exits with 1 if a result is wrong. It needs neither graphs nor the allocator's cache, so that each
tensor can be an allocation of its own, whose end a sanitizer sees.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ivg_fast.ops.block_copy import BlockCopier, copy_blocks_ref
from ivg_fast.ops.guided_sample import guided_sample, guided_sample_ref
from ivg_fast.ops.kv_cache import write_key_value, write_kv_ref
from ivg_fast.ops.paged_attention import WorkListOptions, paged_attention, paged_attention_ref
from ivg_fast.ops.token_logprobs import pair_token_logprobs, pair_token_logprobs_ref

NUM_BLOCKS = 40
FILTERS: tuple[dict[str, Any], ...] = ({}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.2})


class Failed(Exception):
    """A kernel's result is not plain PyTorch's."""


def check(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    got, expected = got.double().cpu(), expected.double().cpu()
    error = float((got - expected).abs().max()) if got.numel() else 0.0
    if not error <= tolerance:
        raise Failed(f"{what}: error {error:.3g}, at most {tolerance:g} expected")


def sampling(device: str) -> None:
    # A vocabulary that ends in the middle of a block, rows that are strided.
    wide = [torch.randn(5, 2600, device=device) * 3 for _ in range(3)]
    logits = [x[:, :2501] for x in wide]
    index = {
        "seeds": torch.arange(5, device=device),
        "candidate_ids": torch.arange(5, device=device),
        "positions": torch.full((5,), 3, device=device),
    }
    for setting in FILTERS:
        arguments = {"temperature": 0.7, **setting, **index}
        got = guided_sample(*logits, **arguments, backend="triton")
        expected = guided_sample_ref(*logits, **arguments)
        check(f"guided_sample {setting}", got.token_ids, expected.token_ids, 0)
        for name in ("logprob", "base_logprob", "implicit_reward"):
            check(
                f"guided_sample {setting} {name}", getattr(got, name), getattr(expected, name), 1e-3
            )
    tokens = torch.tensor([0, 2500, 7, 1024, 2047], device=device)
    got = pair_token_logprobs(logits[1], logits[2], tokens, backend="triton")
    check("token_logprobs", got, pair_token_logprobs_ref(logits[1], logits[2], tokens), 1e-3)


def attention(device: str) -> None:
    prompt, responses, queries = 40, (3, 17, 1, 20), (1, 1, 1, 5)
    table = torch.full((4, 6), 0, dtype=torch.int32)
    for row in range(4):
        table[row] = torch.tensor([1, 2, 3, 4 + 3 * row, 5 + 3 * row, 6 + 3 * row])
    rows = {
        "block_table": table,
        "query_start_loc": torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        "prompt_lens": torch.full((4,), prompt, dtype=torch.int32),
        "response_lens": torch.tensor(responses, dtype=torch.int32),
        "response_block_start": torch.full((4,), 3, dtype=torch.int32),
    }
    for heads, kv_heads, size in ((4, 2, 16), (3, 3, 24)):
        query = torch.randn(sum(queries), heads, size, device=device)
        pools = [torch.randn(NUM_BLOCKS, kv_heads, 16, size, device=device) for _ in range(2)]
        for window in (None, 12):
            options = {"scale": size**-0.5, "sliding_window": window}
            expected = paged_attention_ref(query, *pools, **rows, **options)
            for shared in (2, 1000):
                work = WorkListOptions(run_blocks=2, min_shared_rows=shared, min_shared_tokens=16)
                got = paged_attention(
                    query, *pools, **rows, **options, backend="triton", work_list=work
                )
                check(f"paged_attention {heads}/{kv_heads} heads", got, expected, 2e-3)


def cache(device: str) -> None:
    pools = [torch.randn(NUM_BLOCKS, 2, 16, size, device=device) for size in (24, 16)]
    expected = [pool.clone() for pool in pools]
    states = [torch.randn(4, 2, size, device=device) for size in (24, 16)]
    slots = torch.tensor([5, -1, 16 * NUM_BLOCKS - 1, 40], dtype=torch.int32, device=device)
    write_key_value(*states, *pools, slots, backend="triton")
    for state, pool in zip(states, expected, strict=True):
        write_kv_ref(state, pool, slots)
    pairs = torch.tensor([[0, NUM_BLOCKS - 1], [3, 4], [3, 9]], dtype=torch.int32)
    copiers = ["triton"]
    if device == "cuda" and BlockCopier(pools).backend == "cuda":
        copiers.append("cuda")
    for backend in copiers:
        BlockCopier(pools, backend=backend).copy(pairs)
    copy_blocks_ref(expected, pairs)
    for pool, wanted in zip(pools, expected, strict=True):
        check("cache", pool, wanted, 0)


PARTS: dict[str, Callable[[str], None]] = {
    "sampling": sampling,
    "attention": attention,
    "cache": cache,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args(argv).device
    torch.manual_seed(0)
    code = 0
    for name, part in PARTS.items():
        try:
            part(device)
            print(f"{name}: ok")
        except Failed as error:
            print(f"{name}: {error}")
            code = 1
    if device == "cuda":
        torch.cuda.synchronize()
    return code


if __name__ == "__main__":
    sys.exit(main())
