# SPDX-License-Identifier: Apache-2.0
"""Engine: prompts in, value-guided text out."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ivg_fast import _C
from ivg_fast.burst import BurstRunner
from ivg_fast.draws import BurstResult
from ivg_fast.errors import (
    InvalidParameterError,
    IVGError,
    VocabularyMismatchError,
)
from ivg_fast.kv_budget import affordable_blocks
from ivg_fast.models.loading import load_model, load_tokenizer
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.text_value import TextValueModel, load_value
from ivg_fast.models.value_head import as_value_model
from ivg_fast.models.values import ExplicitValue, TokenScorer, ValueFunction
from ivg_fast.models.vocabulary import check_same_vocabulary, check_tokenizer
from ivg_fast.ops.kv_cache import BlockCopier
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.prompts import PromptInput, RequestFactory, as_prompt_list
from ivg_fast.request import ROLES, LiveRequest
from ivg_fast.scoring import ChunkScorer

# A request that has ended: its id, and its output or what it failed with.
Ended = tuple[int, RequestOutput | BaseException]


class Engine:
    """Decodes prompts with Integrated Value Guidance (arXiv 2409.17819) over a paged KV cache.

    Not thread-safe: one thread owns an engine.

    Args:
        base_model: the model that is steered, a decoder of transformers.
        tokenizer: the base model's; None if prompts are token ids, and nothing needs text.
        tuned, untuned: the pair of the implicit value function; both or none. They share the base
            model's token ids.
        value: the explicit value function. A ValueHeadModel, a ScalarHeadModel, or a sequence or
            token classification model with one label shares them too; one whose backbone is that
            of `tuned` is served by its forwards. Anything else is a ValueFunction, such as a
            TextValueModel, and scores texts.
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
        value: nn.Module | ValueFunction | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = EngineConfig() if config is None else config
        if not isinstance(self.config, EngineConfig):
            raise InvalidParameterError("config", config, "must be an EngineConfig")
        self.tokenizer = tokenizer
        if (tuned is None) != (untuned is None):
            missing = "tuned" if tuned is None else "untuned"
            raise InvalidParameterError(
                missing, None, "must be given too: the implicit value is a pair"
            )
        self._value = ExplicitValue()
        if value is not None and not isinstance(value, nn.Module):
            if not callable(value):
                raise InvalidParameterError("value", value, "must be a model or a ValueFunction")
            self._value, value = ExplicitValue("text", function=value), None
        elif value is not None:
            value = as_value_model(value)
        models = {"base": base_model, "tuned": tuned, "untuned": untuned, "value": value}
        self._runners: dict[str, ModelRunner] = {}
        self._is_busy = False
        try:
            for role, model in models.items():
                if model is None and role != "base":
                    continue
                if not isinstance(model, nn.Module):
                    raise InvalidParameterError(
                        role, model, "must be a torch module; Engine.from_pretrained takes paths"
                    )
                self._runners[role] = ModelRunner(model, role=role)
            self._set_up()
        except BaseException:
            self._value = ExplicitValue()  # a ValueFunction stays as it was given
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
        """Loads every model from a folder (or hub name) in safetensors; checks the vocabularies.

        Args:
            base, tuned, untuned: causal language models with their tokenizers.
            value: a value model (see `load_value_model`). Where its tokenizer is not the base's it
                becomes a TextValueModel.
            device: None: the CPU.
            dtype: "auto": the checkpoint's; float16 becomes float32 on the CPU.
            config: see EngineConfig.

        Raises:
            As the constructor; OSError or InvalidParameterError where a checkpoint cannot be read.
        """
        if torch.device(device or "cpu").type != "cpu":
            raise InvalidParameterError("device", str(device), "must be the CPU")
        tokenizer = load_tokenizer(base)
        models: dict[str, Any] = dict.fromkeys(ROLES)
        for role, path in zip(ROLES, (base, tuned, untuned, value), strict=True):
            if path is None:
                continue
            if role == "value":
                models[role] = load_value(path, tokenizer, device=device, dtype=dtype)
                continue
            models[role] = load_model(path, device=device, dtype=dtype)
            if role != "base":
                check_tokenizer(tokenizer, path, role)
        return cls(models.pop("base"), tokenizer, config=config, **models)

    def _set_up(self) -> None:
        base = self._runners["base"]
        self.vocab_size = base.vocab_size
        if "value" in self._runners:
            value, tuned = self._runners["value"], self._runners.get("tuned")
            is_shared = tuned is not None and value.shares_trunk_with(tuned)
            if tuned is not None and is_shared:
                value.share_pools(tuned)
            self._value = ExplicitValue("scalar" if value.is_scalar else "vocabulary", is_shared)
        for role, runner in self._runners.items():
            if runner.device.type != "cpu":
                raise InvalidParameterError(role, str(runner.device), "must be on the CPU")
            self.vocab_size = min(self.vocab_size, runner.vocab_size)
        if self.tokenizer is not None:
            for role, runner in self._runners.items():
                size = check_same_vocabulary(
                    self.tokenizer, None, base.vocab_size, runner.vocab_size, other_name=role
                )
                self.vocab_size = min(self.vocab_size, size)
        eos = getattr(self.tokenizer, "eos_token_id", None)
        known = sorted({*base.eos_token_ids, *([] if eos is None else [eos])})
        # Of several ends of text some may be past what all models share: those are never drawn.
        eos_ids = [token for token in known if token < self.vocab_size]
        if known and not eos_ids:
            raise VocabularyMismatchError(
                f"token ids {known}, which end a text of the base model, are past the "
                f"{self.vocab_size} ids that all models share"
            )
        eos_id = eos if eos is not None else next(iter(eos_ids), None)
        runners = list(self._runners.values())
        of_texts = self._value.function
        others = []
        if isinstance(of_texts, TextValueModel) and of_texts.num_blocks is None:
            others = [of_texts]
        num_blocks = self.config.num_blocks or affordable_blocks(
            runners, self.config, [text.runner for text in others]
        )
        for runner in runners:
            runner.allocate(num_blocks)
        for text in others:
            text.allocate(num_blocks)
        self._scheduler = _C.Scheduler(
            num_blocks=num_blocks,
            num_roles=len(ROLES),
            max_num_rows=self.config.max_num_rows,
            max_burst_steps=self.config.max_burst_steps,
            max_join_steps=_or_minus_one(self.config.max_join_steps),
            max_queued_requests=_or_minus_one(self.config.max_queued_requests),
            max_prefill_tokens=self.config.max_prefill_tokens,
        )
        pools = [pool for runner in runners for pool in runner.pools]
        token_scorer = TokenScorer(self._runners, self.vocab_size)
        self._burst = BurstRunner(
            self._runners, self.vocab_size, BlockCopier(pools).copy, token_scorer, self.tokenizer
        )
        self._scorer = ChunkScorer(self._runners, token_scorer, eos_id, self.tokenizer)
        self._factory = RequestFactory(
            self._runners,
            self.tokenizer,
            self.vocab_size,
            self.config.max_num_rows,
            eos_ids,
            eos_id,
            self._value,
        )
        self._live: dict[int, LiveRequest] = {}
        self._uncollected: list[Ended] = []  # for the next step() to return

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
            IVGError: bad input is refused before anything runs.
            Exception: a request failed while it ran. The others finish first; `outputs` of the
                error, whatever its type, holds what they returned, None for those that failed.
        """
        self._check_usable()
        requests = self._factory.create(as_prompt_list(prompts), params, seeds)
        outputs: dict[int, RequestOutput] = {}
        failures: list[tuple[int, BaseException]] = []
        ids: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                ids[self._submit(request)] = index
            with tqdm(total=len(requests), desc="ivg", unit="prompt", disable=not use_tqdm) as bar:
                while len(outputs) + len(failures) < len(requests):
                    for request_id, output in self._run_step():
                        if request_id not in ids:
                            self._uncollected.append((request_id, output))
                            continue
                        index = ids.pop(request_id)
                        if isinstance(output, RequestOutput):
                            outputs[index] = output
                        else:
                            failures.append((index, output))
                        bar.update()
        finally:
            self._drop(ids)
        if failures:
            index, error = min(failures, key=lambda failure: failure[0])
            error.add_note(f"prompt {index} of {len(requests)} failed")
            vars(error)["outputs"] = [outputs.get(i) for i in range(len(requests))]
            raise error
        return [outputs[i] for i in range(len(requests))]

    def add_request(
        self, prompt: PromptInput, params: SearchParams, *, seed: int | None = None
    ) -> int:
        """Queues one prompt and returns its request id; `step` runs it.

        Raises:
            InvalidParameterError, CapacityError, QueueFullError: the request is not queued.
        """
        if not self._runners:
            raise IVGError("the engine is closed")
        (request,) = self._factory.create([prompt], params, None if seed is None else [seed])
        return self._submit(request)

    def abort(self, request_id: int) -> bool:
        """Ends a request; the next step returns what it has. False if it has ended already."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[Ended]:
        """Runs one burst and the scoring behind it.

        Returns:
            The requests that ended: (request id, output, or the error that it failed with).
        """
        self._check_usable()
        ended, self._uncollected = self._uncollected, []
        return ended + self._run_step()

    def _check_usable(self) -> None:
        if not self._runners:
            raise IVGError("the engine is closed")
        if self._is_busy:
            raise IVGError("a scorer cannot run the engine that waits for its scores")

    def _run_step(self) -> list[Ended]:
        now = time.monotonic()
        for request in self._live.values():
            if request.deadline is not None and now >= request.deadline:
                self._scheduler.abort(request.request_id, is_deadline=True)
        plan = self._scheduler.plan()
        prefill = [self._live[i] for i in plan.prefill_request_ids.tolist()]
        taking_part = [self._live[i] for i in plan.request_ids.tolist()]
        result = BurstResult.empty(0, len(plan.sample_request))
        with self._failing((*taking_part, *prefill)):
            result = self._burst.run(plan, taking_part, prefill, self._scheduler.history)
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
        ended = self._collect()
        for _, output in ended:
            if not isinstance(output, RequestOutput | Exception):
                self._uncollected += ended
                raise output
        return ended

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to run or to return."""
        return bool(self._live or self._uncollected)

    def _score(self) -> None:
        plan = self._scheduler.plan_scores()
        requests = [self._live[i] for i in plan.request_ids.tolist()]
        if not requests:
            return
        scores, rewards = np.empty(0), None
        with self._failing(requests):
            scores, rewards = self._scorer.run(plan, requests, self._scheduler.history)
        begin = 0
        for request, num_rows in zip(requests, plan.num_rows.tolist(), strict=True):
            mine = slice(begin, begin + num_rows)
            begin += num_rows
            if request.error is None:
                measured = (
                    rewards[mine] if rewards is not None and request.is_scored_by_pair else None
                )
                self._scheduler.commit_scores(request.request_id, scores[mine], measured)

    @contextmanager
    def _failing(self, requests: Sequence[LiveRequest]) -> Iterator[None]:
        """Work for these requests: where it raises, they fail; those with an error are ended."""
        self._is_busy = True
        try:
            with (
                _torch_threads(self.config.num_threads),
                torch.inference_mode(),
                torch.profiler.record_function("ivg::step"),
            ):
                yield
        except BaseException as error:  # an interrupt too: the books must close first
            for request in requests:
                request.error = error
        self._is_busy = False
        for request in requests:
            if request.error is not None:
                self._scheduler.abort(request.request_id)

    def _collect(self) -> list[Ended]:
        ended: list[Ended] = []
        for request_id in self._scheduler.take_finished():
            result = self._scheduler.take_result(request_id)
            request = self._live.pop(request_id)
            output: RequestOutput | BaseException | None = request.error
            if output is None:
                try:
                    output = request.output(result, self.tokenizer)
                except Exception as error:  # a tokenizer that fails on one text fails no other
                    output = error
            ended.append((request_id, output))
        return ended

    def _drop(self, request_ids: Container[int]) -> None:
        """Ends requests whose results nobody waits for."""
        for request_id in list(self._live):
            if request_id in request_ids:
                self._scheduler.abort(request_id)
        ended = self._uncollected + self._collect()
        self._uncollected = [end for end in ended if end[0] not in request_ids]

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
        """Frees the KV pools and gives the models their own attention back; twice is fine.

        Closes the ValueFunction that was given as `value`, if it has `close()`.
        """
        close_value = getattr(self._value.function, "close", None)
        self._value = ExplicitValue()
        if close_value is not None:
            close_value()
        # The first of several roles that share a module saw its own attention: it goes last.
        for runner in reversed(self._runners.values()):
            runner.close()
        self._runners = {}
        vars(self).pop("_burst", None)  # its block copier holds the pools too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _torch_threads(num_threads: int | None) -> Iterator[None]:
    """Models and kernels of this thread run on `num_threads` threads; None: leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _or_minus_one(value: int | None) -> int:
    return -1 if value is None else value
