# SPDX-License-Identifier: Apache-2.0
"""Engine: prompts in, value-guided text out."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ivg_fast import _C
from ivg_fast.burst import BurstResult, BurstRunner
from ivg_fast.errors import CapacityError, InvalidParameterError, IVGError, UnsupportedModelError
from ivg_fast.models.loading import load_model, load_tokenizer
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.value_head import ValueHeadModel, load_value_model
from ivg_fast.models.values import TokenScorer
from ivg_fast.models.vocabulary import check_same_vocabulary
from ivg_fast.ops.kv_cache import BlockCopier
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.request import GUIDES, ROLES, LiveRequest
from ivg_fast.scoring import ChunkScorer

logger = logging.getLogger("ivg_fast")

ModelSource = str | os.PathLike[str] | nn.Module
# A text, chat messages, or token ids.
PromptInput = str | Sequence[Mapping[str, str]] | Sequence[int]

_MASK64 = 2**64 - 1


class Engine:
    """Decodes prompts with Integrated Value Guidance (arXiv 2409.17819) over a paged KV cache.

    Not thread-safe: one thread owns an engine.

    Args:
        base_model: the model that is steered, a decoder of transformers.
        tokenizer: the base model's; None if prompts are token ids, and nothing needs text.
        tuned, untuned: the pair of the implicit value function; both or none. They share the base
            model's token ids.
        value: the explicit value function, a ValueHeadModel that shares them too.
        config: see EngineConfig.

    Raises:
        UnsupportedModelError: a model that cannot be served.
        VocabularyMismatchError: models whose token ids differ.
        CapacityError: no room for a KV pool.
    """

    def __init__(
        self,
        base_model: nn.Module,
        tokenizer: Any = None,
        *,
        tuned: nn.Module | None = None,
        untuned: nn.Module | None = None,
        value: nn.Module | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        if (tuned is None) != (untuned is None):
            missing = "tuned" if tuned is None else "untuned"
            raise InvalidParameterError(
                missing, None, "must be given too: the implicit value is a pair"
            )
        models = {"base": base_model, "tuned": tuned, "untuned": untuned, "value": value}
        self._runners: dict[str, ModelRunner] = {}
        try:
            for role, model in models.items():
                if model is not None:
                    self._runners[role] = ModelRunner(
                        model, role=role, num_threads=self.config.num_threads
                    )
            self._set_up()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str],
        tuned: str | os.PathLike[str] | None = None,
        untuned: str | os.PathLike[str] | None = None,
        value: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        config: EngineConfig | None = None,
    ) -> Self:
        """Loads every model from a folder (or hub name) in safetensors, and checks the
        vocabularies.

        Args:
            base, tuned, untuned: causal language models with their tokenizers.
            value: a vocabulary-head value model: a backbone and `score_head.weight`.
            device: None: the CPU.
            dtype: "auto": the checkpoint's; float16 becomes float32 on the CPU.
            config: see EngineConfig.

        Raises:
            As the constructor; OSError or InvalidParameterError where a checkpoint cannot be read.
        """
        if torch.device(device or "cpu").type != "cpu":
            raise InvalidParameterError("device", str(device), "must be the CPU")
        tokenizer = load_tokenizer(base)
        models: dict[str, nn.Module | None] = dict.fromkeys(ROLES)
        for role, path in zip(ROLES, (base, tuned, untuned, value), strict=True):
            if path is None:
                continue
            loader = load_value_model if role == "value" else load_model
            models[role] = loader(path, device=device, dtype=dtype)
            if role != "base":
                _check_vocabulary(tokenizer, path, role)
        base_model = models.pop("base")
        assert base_model is not None
        return cls(base_model, tokenizer, config=config, **models)

    def _set_up(self) -> None:
        base = self._runners["base"]
        self.vocab_size = base.vocab_size
        for role, runner in self._runners.items():
            if runner.device.type != "cpu":
                raise InvalidParameterError(role, str(runner.device), "must be on the CPU")
            if role == "value" and not isinstance(runner.model, ValueHeadModel):
                raise UnsupportedModelError(
                    f"value must be a ValueHeadModel, got {type(runner.model).__name__}"
                )
            self.vocab_size = min(self.vocab_size, runner.vocab_size)
        if self.tokenizer is not None:
            for role, runner in self._runners.items():
                size = check_same_vocabulary(
                    self.tokenizer, None, base.vocab_size, runner.vocab_size, other_name=role
                )
                self.vocab_size = min(self.vocab_size, size)
        eos = getattr(self.tokenizer, "eos_token_id", None)
        self._eos_ids = sorted({*base.eos_token_ids, *([] if eos is None else [eos])})
        self._eos_id = eos if eos is not None else next(iter(self._eos_ids), None)
        num_blocks = self.config.num_blocks or self._affordable_blocks()
        for runner in self._runners.values():
            runner.allocate(num_blocks)
        self._scheduler = _C.Scheduler(
            num_blocks=num_blocks,
            num_roles=len(ROLES),
            max_num_rows=self.config.max_num_rows,
            max_burst_steps=self.config.max_burst_steps,
            max_join_steps=_or_minus_one(self.config.max_join_steps),
            max_queued_requests=_or_minus_one(self.config.max_queued_requests),
        )
        pools = [pool for runner in self._runners.values() for pool in runner.pools]
        token_scorer = TokenScorer(self._runners, self.vocab_size)
        self._burst = BurstRunner(
            self._runners, self.vocab_size, BlockCopier(pools).copy, token_scorer, self.tokenizer
        )
        self._scorer = ChunkScorer(self._runners, token_scorer, self._eos_id, self.tokenizer)
        self._live: dict[int, LiveRequest] = {}

    def _affordable_blocks(self) -> int:
        block_bytes = sum(runner.bytes_per_block for runner in self._runners.values())
        budget = int(self.config.kv_memory_fraction * _available_memory())
        num_blocks = min(budget // block_bytes, 2**31 // _C.BLOCK_SIZE - 1)
        limits = [r.max_position for r in self._runners.values() if r.max_position is not None]
        if limits:
            # A prompt and a response round up to whole blocks each.
            num_blocks = min(
                num_blocks, self.config.max_num_rows * (min(limits) // _C.BLOCK_SIZE + 2)
            )
        if num_blocks < 1:
            raise CapacityError(
                f"kv_memory_fraction {self.config.kv_memory_fraction} of the free memory is "
                f"{budget} bytes, a KV block of all roles takes {block_bytes}"
            )
        return num_blocks

    # --- requests --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SearchParams | Sequence[SearchParams],
        *,
        seeds: Sequence[int] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Decodes prompts together.

        Args:
            prompts: a text, chat messages, token ids, or a list of these.
            params: for all prompts, or one each.
            seeds: one a prompt. Without it, prompt i of one params object with a seed draws from a
                seed derived from (seed, i), that of i = 0 being the seed itself.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One RequestOutput a prompt, in their order.

        Raises:
            IVGError: bad input is refused before anything runs. If a request fails while it runs,
            the
                others finish and then its error is raised; `error.outputs` holds what they
                returned, None for those that failed.
        """
        requests = self._prepare(prompts, params, seeds)
        outputs: dict[int, RequestOutput] = {}
        failures: list[tuple[int, Exception]] = []
        ids: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                ids[self._submit(request)] = index
            with tqdm(total=len(requests), desc="ivg", unit="prompt", disable=not use_tqdm) as bar:
                while len(outputs) + len(failures) < len(requests):
                    for request_id, output in self.step():
                        index = ids.pop(request_id)
                        if isinstance(output, RequestOutput):
                            outputs[index] = output
                        else:
                            failures.append((index, output))
                        bar.update()
        finally:
            for request_id in ids:  # empty unless something was raised
                self.abort(request_id)
        if failures:
            index, error = min(failures, key=lambda failure: failure[0])
            error.add_note(f"prompt {index} of {len(requests)} failed")
            if isinstance(error, IVGError):
                error.outputs = [outputs.get(i) for i in range(len(requests))]
            raise error
        return [outputs[i] for i in range(len(requests))]

    def add_request(
        self, prompt: PromptInput, params: SearchParams, *, seed: int | None = None
    ) -> int:
        """Queues one prompt and returns its request id; `step` runs it.

        Raises:
            InvalidParameterError, CapacityError, QueueFullError: the request is not queued.
        """
        (request,) = self._prepare([prompt], params, None if seed is None else [seed])
        return self._submit(request)

    def abort(self, request_id: int) -> bool:
        """Ends a request; the next step returns what it has. False if it has ended already."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[tuple[int, RequestOutput | Exception]]:
        """Runs one burst and the scoring behind it.

        Returns:
            The requests that ended: (request id, output, or the error that it failed with).
        """
        now = time.monotonic()
        for request in self._live.values():
            if request.deadline is not None and now >= request.deadline:
                self._scheduler.abort(request.request_id, is_deadline=True)
        plan = self._scheduler.plan()
        prefill = [self._live[i] for i in plan.prefill_request_ids.tolist()]
        taking_part = [self._live[i] for i in plan.request_ids.tolist()]
        try:
            with torch.inference_mode(), torch.profiler.record_function("ivg::burst"):
                result = self._burst.run(plan, taking_part, prefill, self._scheduler.history)
        except Exception as error:
            result = BurstResult.empty(0, len(plan.sample_request))
            for request in (*taking_part, *prefill):
                request.error = error
        self._abort_failed((*taking_part, *prefill))
        if taking_part:
            self._scheduler.commit_tokens(
                result.tokens,
                result.logprobs,
                result.base_logprobs,
                result.rewards,
                result.num_tokens,
                result.finish,
                result.stop_index,
            )
        self._score()
        return self._collect()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.has_unfinished

    def _score(self) -> None:
        plan = self._scheduler.plan_scores()
        requests = [self._live[i] for i in plan.request_ids.tolist()]
        if not requests:
            return
        try:
            with torch.inference_mode(), torch.profiler.record_function("ivg::score"):
                scores, rewards = self._scorer.run(plan, requests, self._scheduler.history)
        except Exception as error:
            for request in requests:
                request.error = error
        self._abort_failed(requests)
        begin = 0
        for request, num_rows in zip(requests, plan.num_rows.tolist(), strict=True):
            mine = slice(begin, begin + num_rows)
            begin += num_rows
            if request.error is None:
                measured = (
                    rewards[mine] if rewards is not None and request.is_scored_by_pair else None
                )
                self._scheduler.commit_scores(request.request_id, scores[mine], measured)

    def _abort_failed(self, requests: Iterable[LiveRequest]) -> None:
        for request in requests:
            if request.error is not None:
                self._scheduler.abort(request.request_id)

    def _collect(self) -> list[tuple[int, RequestOutput | Exception]]:
        ended: list[tuple[int, RequestOutput | Exception]] = []
        for request_id in self._scheduler.take_finished():
            result = self._scheduler.take_result(request_id)
            request = self._live.pop(request_id)
            ended.append((request_id, request.error or request.output(result, self.tokenizer)))
        return ended

    # --- what comes in ---------------------------------------------------------------------------

    def _prepare(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SearchParams | Sequence[SearchParams],
        seeds: Sequence[int] | None,
    ) -> list[LiveRequest]:
        items = _as_list(prompts)
        if isinstance(params, SearchParams):
            every = [params] * len(items)
        else:
            every = list(params)
            if len(every) != len(items):
                raise InvalidParameterError("params", len(every), f"must be one, or {len(items)}")
        if seeds is not None and len(seeds) != len(items):
            raise InvalidParameterError("seeds", len(seeds), f"must be {len(items)}, one a prompt")
        requests = []
        for index, (prompt, p) in enumerate(zip(items, every, strict=True)):
            if not isinstance(p, SearchParams):
                raise InvalidParameterError("params", p, "must be SearchParams")
            if seeds is not None:
                seed = _checked_seed(seeds[index])
            elif p.seed is None:
                seed = secrets.randbits(64)
            else:
                seed = derive_seed(p.seed, index) if isinstance(params, SearchParams) else p.seed
            text, token_ids = self._encode(prompt)
            request = LiveRequest.create(p, text, token_ids, seed, self._eos_ids)
            self._check(request)
            requests.append(request)
        return requests

    def _encode(self, prompt: PromptInput) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, str):
            self._need_tokenizer("prompts", prompt)
            return prompt, self.tokenizer(prompt).input_ids
        if len(prompt) and isinstance(prompt[0], Mapping):
            self._need_tokenizer("prompts", "chat messages")
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise InvalidParameterError(
                    "prompts", "chat messages", "need a tokenizer with a chat template"
                )
            text = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
            # The template has written the special tokens already.
            return text, self.tokenizer(text, add_special_tokens=False).input_ids
        return None, [_token_id(token) for token in prompt]

    def _need_tokenizer(self, name: str, value: object) -> None:
        if self.tokenizer is None:
            raise InvalidParameterError(name, value, "need an engine with a tokenizer")

    def _check(self, request: LiveRequest) -> None:
        p = request.params
        for name, wanted in (("guidance", p.guidance), ("scorer", p.scorer)):
            missing = (
                [] if callable(wanted) else [r for r in GUIDES[wanted] if r not in self._runners]
            )
            if missing:
                raise InvalidParameterError(
                    name, wanted, f"needs {' and '.join(missing)}, which this engine was not given"
                )
        if p.stop:
            self._need_tokenizer("stop", p.stop)
        if callable(p.scorer):
            self._need_tokenizer("scorer", p.scorer)
        if p.score_eos_on_truncation and self._eos_id is None:
            raise InvalidParameterError(
                "score_eos_on_truncation", True, "needs a model with an end-of-text token"
            )
        for token in p.stop_token_ids:
            if token >= self.vocab_size:
                raise InvalidParameterError(
                    "stop_token_ids", token, f"must be below {self.vocab_size}"
                )
        for role, ids in request.prompt_ids.items():
            if not len(ids):
                raise InvalidParameterError("prompts", request.prompt, "must have a token at least")
            unknown = ids[(ids < 0) | (ids >= self._runners[role].vocab_size)]
            if len(unknown):
                raise InvalidParameterError(
                    "prompts",
                    int(unknown[0]),
                    f"must be token ids of {role}, in [0, {self._runners[role].vocab_size})",
                )
            limit = self._runners[role].max_position
            if limit is not None and len(ids) + p.max_tokens > limit:
                raise CapacityError(
                    f"a prompt of {len(ids)} tokens and max_tokens {p.max_tokens} exceed the "
                    f"{limit} positions of {role}"
                )

    def _submit(self, request: LiveRequest) -> int:
        request.request_id = self._scheduler.add_request(**request.spec())
        self._live[request.request_id] = request
        return request.request_id

    # --- life ------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """What waits, runs and is held now: counts of requests, rows and KV blocks."""
        return self._scheduler.stats()

    def check_integrity(self) -> None:
        """Raises RuntimeError if the books of the scheduler and the KV pool disagree."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Frees the KV pools and gives the models their own attention back; twice is fine."""
        for runner in self._runners.values():
            runner.close()
        self._runners = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def derive_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` among prompts that share one: 64 bits, index 0 keeps the seed
    itself.

    The finaliser of splitmix64 spreads the sum, so that neighbours in seed and index do not meet.
    """
    if index == 0:
        return seed
    x = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray | torch.Tensor):
        prompts = prompts.tolist()
    items = list(prompts)
    is_one = bool(items) and (
        all(isinstance(item, Mapping) for item in items)
        or all(isinstance(item, int | np.integer) for item in items)
    )
    return [items] if is_one else items


def _token_id(token: Any) -> int:
    if isinstance(token, bool) or not isinstance(token, int | np.integer):
        raise InvalidParameterError("prompts", token, "must be texts, chat messages or token ids")
    return int(token)


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= _MASK64:
        raise InvalidParameterError("seeds", seed, "must be integers in [0, 2^64)")
    return int(seed)


def _check_vocabulary(tokenizer: Any, path: str | os.PathLike[str], role: str) -> None:
    try:
        other = load_tokenizer(path)
    except (OSError, ValueError):
        logger.warning(
            "%s has no tokenizer at %s: its token ids are taken for the base's", role, path
        )
        return
    size = max(len(tokenizer), len(other))
    check_same_vocabulary(tokenizer, other, size, size, other_name=role)


def _or_minus_one(value: int | None) -> int:
    return -1 if value is None else value


def _available_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
