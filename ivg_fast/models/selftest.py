# SPDX-License-Identifier: Apache-2.0
"""The load-time check that a model computes the same on the paged cache as by itself.

Three sequences of random tokens go through every path that an engine takes: whole prompts, a decode
step beside a fresh prompt, and extensions by chunks, over scattered blocks and with the unread hole
between prompt and response that a longer prompt of another role leaves. Each position's logits are
compared with those of the model's own attention on the whole sequence at once; for a scalar head
the hidden states that it reads, as one number could agree by chance, or lie in a spread too small
to measure by. A sliding window longer than these sequences is shortened meanwhile, or the check
could not see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ivg_fast.errors import UnsupportedModelError
from ivg_fast.models.attention import ATTENTION_NAME
from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch
from ivg_fast.models.support import is_quantized

if TYPE_CHECKING:
    from ivg_fast.models.runner import ModelRunner

# Root mean square over the vocabulary of (paged - stock), in units of the stock logits' spread, at
# the worst position of a step in float32. In half precision the two sum in different orders and a
# mixture of experts may even route a token elsewhere, so there the median position counts. So it
# does in quantised models: one scale for all inputs of a layer is another scale for each batch.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}
_TOLERANCE_QUANTIZED = 0.3

# (step of the prompt, its tokens, the response tokens of each later step) of each row
_ROWS = (
    (0, 19, (1, 5, 1)),
    (0, 7, (3, 1, 14)),
    (1, 16, (2, 1)),
)
_TABLE_WIDTH = 4
_TEST_WINDOW = 8


def check_model(runner: ModelRunner, *, can_shorten_window: bool = True) -> float:
    """Compares paged with stock logits; returns the deviation.

    Args:
        runner: of the model.
        can_shorten_window: False where the model has been through this in its plain form, and
            should not be compiled for another window than its own.

    Raises:
        UnsupportedModelError: they disagree; names the model type and the deviation.
    """
    with _short_window(runner) if can_shorten_window else nullcontext():
        deviation = _deviation(runner)
    limit = _TOLERANCE.get(runner.dtype, _TOLERANCE[torch.bfloat16])
    if is_quantized(runner.model):
        limit = _TOLERANCE_QUANTIZED
    if not deviation <= limit:  # also where it is NaN
        raise UnsupportedModelError(
            f"{runner.role}: model type {runner.config.model_type!r} computes other "
            f"{'hidden states' if runner.is_scalar else 'logits'} on the paged cache than by "
            f"itself: deviation {deviation:.3g}, at most {limit:g} expected in "
            f"{str(runner.dtype).removeprefix('torch.')}"
        )
    return deviation


@torch.inference_mode()
def _deviation(runner: ModelRunner) -> float:
    limit = runner.max_position or sum(map(sum, [(p, *r) for _, p, r in _ROWS]))
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(runner.vocab_size, (min(limit, prompt + sum(response)),), generator=generator)
        for _, prompt, response in _ROWS
    ]
    try:
        paged = _paged_logits(runner, texts)
        # SDPA leaves soft caps out in some versions of transformers; eager never does.
        has_cap = getattr(runner.config, "attn_logit_softcapping", None) is not None
        runner.use_attention("eager" if has_cap else runner.stock_attention)
        stock = [_stock_logits(runner, text) for text in texts]
    finally:
        runner.use_attention(ATTENTION_NAME)
        runner.allocate(0)
    # A head of zeros, as values start their training with, has no spread.
    spread = torch.cat(stock).std().clamp(min=torch.finfo(torch.float32).tiny)
    worst = 0.0
    is_exact = runner.dtype == torch.float32 and not is_quantized(runner.model)
    for pieces in paged:
        errors = torch.cat(
            [
                (logits - stock[row][begin : begin + len(logits)]).square().mean(-1).sqrt()
                for row, begin, logits in pieces
            ]
        )
        error = float((errors.max() if is_exact else errors.median()) / spread)
        worst = float(np.maximum(worst, error))  # keeps a NaN

    return worst


def _stock_logits(runner: ModelRunner, text: torch.Tensor) -> torch.Tensor:
    """[n, V] of the whole text by the model's own attention; [n, H] for a scalar head."""
    ids = text[None].to(runner.device)
    positions = torch.arange(len(text), device=runner.device)[None]
    model = runner.network if runner.is_scalar else runner.model
    output: Any = model(input_ids=ids, position_ids=positions, use_cache=False)
    if runner.is_scalar:
        return output.last_hidden_state[0].float()
    return getattr(output, "logits", output)[0].float()


def _paged_logits(
    runner: ModelRunner, texts: list[torch.Tensor]
) -> list[list[tuple[int, int, torch.Tensor]]]:
    """Of each step, (row, first position, logits [n, V]) of each row that runs in it."""
    num_blocks = len(texts) * _TABLE_WIDTH
    runner.allocate(num_blocks)
    for pool in runner.pools:
        pool.fill_(2.0)  # what must not be read would show
    # 7 has no common factor with the number of blocks: a row's blocks lie scattered.
    table = (np.arange(num_blocks, dtype=np.int32).reshape(-1, _TABLE_WIDTH) * 7 + 3) % num_blocks
    done = [0] * len(texts)
    steps = []
    for step in range(1 + max(first + len(response) for first, _, response in _ROWS)):
        spans: list[tuple[int, int, int]] = []
        for row, (first, prompt, response) in enumerate(_ROWS):
            lengths = (prompt, *response)
            if 0 <= step - first < len(lengths):
                begin, end = done[row], min(len(texts[row]), done[row] + lengths[step - first])
                done[row] = end
                if end > begin:
                    spans.append((row, begin, end))
        if spans:
            batch = _pack(texts, table, spans, runner.device)
            outputs = runner.hidden(batch) if runner.is_scalar else runner.forward(batch)
            logits = outputs.float().split([end - begin for _, begin, end in spans])
            steps.append(
                [(row, begin, x) for (row, begin, _), x in zip(spans, logits, strict=True)]
            )
    return steps


def _pack(
    texts: list[torch.Tensor],
    table: np.ndarray,
    spans: list[tuple[int, int, int]],
    device: torch.device,
) -> ForwardBatch:
    """One batch of the positions [begin, end) of each (row, begin, end)."""
    ids, positions, slots = [], [], []
    rows = [row for row, _, _ in spans]
    # Row 1 has a prompt block more than its prompt needs, as if another role's prompt were longer.
    starts = [-(-_ROWS[row][1] // BLOCK_SIZE) + (row == 1) for row in rows]
    for (row, begin, end), start in zip(spans, starts, strict=True):
        position = np.arange(begin, end)
        prompt = _ROWS[row][1]
        slot = np.where(position < prompt, position, position - prompt + start * BLOCK_SIZE)
        ids.append(texts[row][begin:end].numpy())
        positions.append(position)
        slots.append(table[row, slot // BLOCK_SIZE] * BLOCK_SIZE + slot % BLOCK_SIZE)
    ends = np.array([end for _, _, end in spans])
    prompts = np.minimum(ends, [_ROWS[row][1] for row in rows])
    lengths = [end - begin for _, begin, end in spans]
    return ForwardBatch.from_host(
        input_ids=np.concatenate(ids),
        position_ids=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        query_start_loc=np.cumsum([0, *lengths]),
        prompt_lens=prompts,
        response_lens=ends - prompts,
        response_block_start=starts,
        block_table=table[rows],
        logit_positions=np.arange(sum(lengths)),
        device=device,
    )


@contextmanager
def _short_window(runner: ModelRunner) -> Iterator[None]:
    """Shortens the model's sliding window for the check, in the config and in the layers alike."""
    text = runner.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or window <= _TEST_WINDOW:
        yield
        return
    holders: list[Any] = [text]
    for module in runner.model.modules():
        if getattr(module, "sliding_window", None) == window:
            holders.append(module)
    try:
        for holder in holders:
            holder.sliding_window = _TEST_WINDOW
        yield
    finally:
        for holder in holders:
            holder.sliding_window = window
