# SPDX-License-Identifier: Apache-2.0
"""Chunk-level beam search over a batch of prompts, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.baselines.cached_role import CachedRole
from bench.baselines.common import BaselineResult, chunk_length, stop_ids
from bench.baselines.inverse_cdf import draw
from bench.baselines.selection import Hypothesis, PromptSearch
from bench.baselines.tree_cache import tree_mask
from ivg_fast.params import SearchParams

# Siblings share a row up to this many local slots; beyond, each child gets a row of its own,
# because every query of a row computes (masked) scores on its siblings' local slots too.
MAX_TREE_SLOTS = 128
# A GPU has that arithmetic to spare while it waits for weights, and would copy the prompt for rows
# of their own. Not measured.
MAX_GPU_TREE_SLOTS = 1024


class TreeSearch:
    """Some prompts on their way to their responses: rows of trunks, leaves row by row."""

    def __init__(
        self,
        roles: dict[str, CachedRole],
        prompts: Sequence[Sequence[int]],
        params: SearchParams,
        seeds: Sequence[int],
        eos_token_ids: Sequence[int],
        use_constant_shapes: bool,
    ) -> None:
        self.params = params
        self.device, self.dtype = roles["base"].device, roles["base"].dtype
        self.use_constant_shapes = use_constant_shapes
        guides = {"none": (), "implicit": ("tuned", "untuned"), "explicit": ("value",)}
        steering = ("base", *guides[params.guidance])
        scoring = [name for name in guides[params.scorer] if name not in steering]
        # The value head that reads what the tuned guide has computed for its own logits.
        self.value_weight: Tensor | None = None
        if scoring == ["value"] and "tuned" in steering:
            self.value_weight = roles["tuned"].value_weight
        if self.value_weight is not None:
            scoring = []
        self.steering = {name: roles[name] for name in steering}
        self.scoring = {name: roles[name] for name in scoring}
        stops = stop_ids(eos_token_ids, params)
        self.stops = torch.tensor(stops, device=self.device) if stops else None
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        self.searches = [PromptSearch(params) for _ in prompts]
        self.row_prompts = list(range(len(prompts)))
        self.base = self.prompt_slots = max(map(len, prompts))
        pads = [self.base - len(prompt) for prompt in prompts]
        self.padding = torch.tensor(pads, device=self.device)
        self._open_caches(len(prompts))
        self._prefill(
            torch.tensor(
                [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)],
                device=self.device,
            )
        )
        self.carried = torch.zeros(len(prompts), device=self.device)  # implicit reward of a trunk

    def _fanout(self, num_children: int, num_tokens: int) -> int:
        """Children that share a row in a chunk of `num_tokens`."""
        limit = MAX_GPU_TREE_SLOTS if self.device.type == "cuda" else MAX_TREE_SLOTS
        fits = num_children * (num_tokens - 1) <= limit
        return num_children if fits else 1

    def _open_caches(self, num_prompts: int) -> None:
        params = self.params
        length = min(chunk_length(params), params.max_tokens)
        max_rows, num_local = num_prompts * params.beam_width, 0
        for children in (params.pool_size, params.num_candidates):
            for num_tokens in (length, params.max_tokens % length):  # the last chunk may be short
                fanout = self._fanout(children, num_tokens)
                max_rows = max(max_rows, num_prompts * params.pool_size // fanout)
                num_local = max(num_local, fanout * num_tokens)
        # Masks whose rows begin at 16 bytes are not copied before attention.
        self.num_slots = -(-(self.base + params.max_tokens + num_local) // 8) * 8
        for role in (self.steering | self.scoring).values():
            role.open_cache(num_prompts, max_rows, self.num_slots)

    def _prefill(self, ids: Tensor) -> None:
        num_slots = ids.shape[1]
        positions = (torch.arange(num_slots, device=self.device) - self.padding[:, None]).clamp(0)
        mask = tree_mask(self.padding, 0, 1, num_slots, num_slots, self.dtype)
        self.logits = {}
        for name, role in self.steering.items():
            outputs = role.logits(ids, positions, mask, keep=1)
            self._collect(self.logits, name, tuple(x[:, -1] for x in outputs))
        self.pending = ids[:, -1:]  # scoring roles write a trunk's last token with the next chunk
        if num_slots > 1:
            for role in self.scoring.values():
                role.hidden(ids[:, :-1], positions[:, :-1], mask[:, :, :-1, :-1])

    def search(self) -> list[BaselineResult]:
        """Runs to the end; the best hypothesis of each prompt."""
        params = self.params
        num_left, length = params.max_tokens, chunk_length(params)
        num_children = params.pool_size
        while True:
            num_tokens = min(length, num_left)
            tokens, lengths, scores = self._run_chunk(num_children, num_tokens)
            leaves = self._select(num_children, tokens, lengths, scores)
            num_left -= num_tokens
            if num_left == 0 or not leaves:
                winners = [search.survivors[0] for search in self.searches]
                return [BaselineResult(kept.token_ids, kept.score) for kept in winners]
            self._keep(leaves, num_tokens)
            num_children = params.num_candidates

    def _run_chunk(self, num_children: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples and scores the children of all rows: tokens [N, n], lengths [N], scores [N]."""
        uniforms = self._uniforms(num_children, num_tokens)
        self.fanout = self._fanout(num_children, num_tokens)
        combined = self._combine(self.logits)
        first = draw(combined, uniforms[:, 0].view(-1, num_children), self.params)
        tokens, measures = [first.view(-1)], [self._measure(self.logits, first).reshape(-1)]
        if self.fanout < num_children:
            self._spread(num_children)
        fanout, base = self.fanout, self.base
        end = self._width(base + (num_tokens - 1) * fanout)
        mask = tree_mask(self.padding, base, fanout, num_tokens - 1, end, self.dtype)
        lengths = torch.full_like(tokens[0], num_tokens)
        for step in range(1, num_tokens):
            if self.stops is not None:
                stopped = torch.isin(tokens[-1], self.stops) & (lengths > step)
                lengths.masked_fill_(stopped, step)
                if bool((lengths <= step).all()):
                    break
            start = base + (step - 1) * fanout
            width = self._width(start + fanout)
            seen = mask[:, :, (step - 1) * fanout : step * fanout, :width]
            positions = (base + step - 1 - self.padding)[:, None].expand(-1, fanout)
            logits = self._forward(tokens[-1].view(-1, fanout), positions, seen, start)
            token = draw(self._combine(logits), uniforms[:, step, None], self.params)
            measures.append(self._measure(logits, token)[:, 0])
            tokens.append(token[:, 0])
        chunk = torch.stack(tokens, dim=1)
        scores = self._score(chunk, lengths, torch.stack(measures, dim=1), mask)
        return chunk, lengths, scores

    def _forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, start: int
    ) -> dict[str, Tensor]:
        logits = {}
        for name, role in self.steering.items():
            role.cache.start = start
            step = role.step_at_constant_shape if self.use_constant_shapes else role.logits
            outputs = step(ids, positions, mask)
            self._collect(logits, name, tuple(x.flatten(0, 1) for x in outputs))
        return logits

    @staticmethod
    def _collect(logits: dict[str, Tensor], name: str, outputs: tuple[Tensor, ...]) -> None:
        """Puts a role's outputs in: logits, and hidden states where it gives them."""
        logits[name] = outputs[0]
        if len(outputs) > 1:
            logits["states"] = outputs[1]

    def _width(self, num_slots: int) -> int:
        """Slots that the mask of a decode step covers."""
        return self.num_slots if self.use_constant_shapes else num_slots

    def _uniforms(self, num_children: int, num_tokens: int) -> Tensor:
        """[N, n]; each prompt has its generator, so that the batch does not change its draws."""
        parts = [
            torch.rand(
                (self.row_prompts.count(prompt) * num_children, num_tokens),
                generator=self.generators[prompt],
                device=self.device,
            )
            for prompt in dict.fromkeys(self.row_prompts)
        ]
        return torch.cat(parts)

    def _spread(self, num_children: int) -> None:
        """Gives each child a row of its own."""
        for role in (self.steering | self.scoring).values():
            role.cache.repeat_rows(num_children)
        self.row_prompts = [prompt for prompt in self.row_prompts for _ in range(num_children)]
        self.padding = self.padding.repeat_interleave(num_children)
        self.pending = self.pending.repeat_interleave(num_children, dim=0)
        self.carried = self.carried.repeat_interleave(num_children)

    def _combine(self, logits: dict[str, Tensor]) -> Tensor:
        weight = self.params.guidance_weight
        if self.params.guidance == "implicit":
            return logits["base"] + weight * (logits["tuned"] - logits["untuned"])
        if self.params.guidance == "explicit":
            return logits["base"] + weight * logits["value"]
        return logits["base"]

    def _measure(self, logits: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """What the scorer can take from the steering roles' logits: [R, C] for tokens [R, C]."""
        if self.params.scorer == "implicit" and self.params.guidance == "implicit":
            tuned, untuned = logits["tuned"], logits["untuned"]
            shift = tuned.logsumexp(-1, keepdim=True) - untuned.logsumexp(-1, keepdim=True)
            return tuned.gather(1, tokens) - untuned.gather(1, tokens) - shift
        if self.params.scorer == "explicit" and self.params.guidance == "explicit":
            return logits["value"].gather(1, tokens)
        if self.value_weight is not None:
            return (logits["states"][:, None] * self.value_weight[tokens]).sum(dim=-1).float()
        return torch.zeros_like(tokens, dtype=torch.float32)

    def _score(self, chunk: Tensor, lengths: Tensor, measures: Tensor, mask: Tensor) -> Tensor:
        """Scores [N] of the whole prefixes."""
        if self.params.scorer == "none":
            return measures[:, 0]
        lengths = lengths.clamp(max=chunk.shape[1])
        if self.params.scorer == "explicit":
            if not self.scoring:
                return measures.gather(1, lengths[:, None] - 1)[:, 0]
            return self._explicit(chunk, lengths, mask)
        rewards = self._implicit(chunk, mask) if self.scoring else measures
        counted = torch.arange(chunk.shape[1], device=self.device) < lengths[:, None]
        self.leaf_rewards = self.carried.repeat_interleave(self.fanout)
        self.leaf_rewards += (rewards * counted).sum(dim=1)
        return self.leaf_rewards

    def _scoring_inputs(self, chunk: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and mask of [trunk's last token | all leaves' tokens but the last]."""
        depth, fanout = chunk.shape[1] - 1, self.fanout
        inner = chunk[:, :-1].view(len(self.padding), fanout, depth).transpose(1, 2).flatten(1)
        ids = torch.cat([self.pending, inner], dim=1)
        steps = torch.arange(depth, device=self.device).repeat_interleave(fanout)
        steps = torch.cat([steps.new_tensor([-1]), steps])
        positions = self.base + steps - self.padding[:, None]
        end = self.base + depth * fanout
        trunk = tree_mask(self.padding, self.base - 1, 1, 1, end, self.dtype)
        return ids, positions, torch.cat([trunk, mask[:, :, : depth * fanout, :end]], dim=2)

    def _explicit(self, chunk: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        role = self.scoring["value"]
        role.cache.start = self.base - 1
        hidden = role.hidden(*self._scoring_inputs(chunk, mask))
        child = torch.arange(self.fanout, device=self.device)
        before = 1 + (lengths.view(-1, self.fanout) - 2) * self.fanout + child
        before = before.clamp(min=0)  # of a leaf's only token: the trunk's last
        before = before.masked_fill_(lengths.view(-1, self.fanout) == 1, 0)
        states = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
        last = chunk.gather(1, lengths[:, None] - 1)[:, 0]
        assert role.head_weight is not None
        return (states * role.head_weight[last]).sum(dim=-1).float()

    def _implicit(self, chunk: Tensor, mask: Tensor) -> Tensor:
        """[N, n] log tuned - log untuned of each token, by the pair as a mere scorer."""
        inputs = self._scoring_inputs(chunk, mask)
        by_row = chunk.view(-1, self.fanout, chunk.shape[1])
        inner = by_row[:, :, 1:].transpose(1, 2).flatten(1)
        rewards = torch.zeros(by_row.shape, device=self.device)
        for name, sign in (("tuned", 1.0), ("untuned", -1.0)):
            role = self.scoring[name]
            role.cache.start = self.base - 1
            logits = role.logits(*inputs)[0]
            shift = logits.logsumexp(dim=-1)
            rewards[:, :, 0] += sign * (logits[:, 0].gather(1, by_row[:, :, 0]) - shift[:, :1])
            later = logits[:, 1:].gather(2, inner[..., None])[..., 0] - shift[:, 1:]
            later = later.view(len(by_row), by_row.shape[2] - 1, self.fanout).transpose(1, 2)
            rewards[:, :, 1:] += sign * later
        return rewards.flatten(0, 1)

    def _select(
        self, num_children: int, chunk: Tensor, lengths: Tensor, scores: Tensor
    ) -> list[tuple[int, int, int]]:
        """Ranks each prompt's pool: (leaf, prompt, last token) of the survivors that go on."""
        stops = set() if self.stops is None else set(self.stops.tolist())
        rows = zip(chunk.tolist(), lengths.tolist(), scores.tolist(), strict=True)
        leaves = enumerate(rows)
        going_on = []
        for prompt in dict.fromkeys(self.row_prompts):
            search = self.searches[prompt]
            children = []
            for rank in search.active:
                parent = search.survivors[rank]
                children.append([])
                for _ in range(num_children):
                    leaf, (tokens, length, score) = next(leaves)
                    new = tokens[:length]
                    ends = new[-1] in stops
                    children[-1].append(Hypothesis(parent.token_ids + new, score, ends, leaf))
            search.select(children)
            kept = (search.survivors[rank] for rank in search.active)
            going_on += [(one.source, prompt, one.token_ids[-1]) for one in kept]
        return going_on

    def _keep(self, leaves: Sequence[tuple[int, int, int]], num_tokens: int) -> None:
        """Makes the surviving leaves the trunks, and forwards their last tokens once."""
        sources = torch.tensor([leaf for leaf, _, _ in leaves], device=self.device)
        last = torch.tensor([[token] for _, _, token in leaves], device=self.device)
        prompts = [prompt for _, prompt, _ in leaves]
        rows, child = sources // self.fanout, sources % self.fanout
        steps = torch.arange(num_tokens - 1, device=self.device) * self.fanout
        local_slots = self.base + steps + child[:, None]
        first = self.prompt_slots if prompts == self.row_prompts else 0
        for role in (self.steering | self.scoring).values():
            role.cache.keep(rows, first, self.base, local_slots)
        self.row_prompts = prompts
        self.padding = self.padding[rows]
        if self.params.scorer == "implicit":
            self.carried = self.leaf_rewards[sources]
        self.base += num_tokens
        self.pending = last
        width = self._width(self.base)
        mask = tree_mask(self.padding, self.base - 1, 1, 1, width, self.dtype)
        positions = (self.base - 1 - self.padding)[:, None]
        self.logits = self._forward(last, positions, mask, self.base - 1)
