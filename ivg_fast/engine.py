# SPDX-License-Identifier: Apache-2.0
"""Engine: prompts in, value-guided text out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from ivg_fast import _C
from ivg_fast.burst import BurstRunner
from ivg_fast.devices import check_placed, checked_device, device_of, on_device
from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.kv_budget import allocate_pools
from ivg_fast.loop import Ended, RequestLoop
from ivg_fast.models.checkpoints import check_pair
from ivg_fast.models.roles import load_roles
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.shared_pieces import GuideVocabulary, checked_guide_vocabulary, share_pieces
from ivg_fast.models.text_value import TextValueModel, check_function
from ivg_fast.models.value_head import as_value_model
from ivg_fast.models.values import ExplicitValue, TokenScorer, ValueFunction
from ivg_fast.models.vocabulary import ends_of_text, shared_vocab_size
from ivg_fast.ops.block_copy import BlockCopier
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams, check_integer
from ivg_fast.prompts import RequestFactory
from ivg_fast.rendering import PromptInput, PromptRenderer, as_prompt_list, tokenizers_by_role
from ivg_fast.request import ROLES
from ivg_fast.scoring import ChunkScorer
from ivg_fast.static_burst import StaticBursts
from ivg_fast.templates import Template
from ivg_fast.warmup import WARMUP_PROMPT, warm_up


class Engine:
    """Decodes prompts with Integrated Value Guidance (arXiv 2409.17819) over a paged KV cache.

    One thread owns an engine; `add_request` and `abort` alone may be called on others.

    Args:
        base_model: the model that is steered, a decoder of transformers; where it is, the CPU or a
            GPU, the others must be.
        tokenizer: the base model's; None if prompts are token ids, and nothing needs text.
        tuned, untuned: the pair of the implicit value function; both or none. They share the base
            model's token ids.
        value: the explicit value function. A ValueHeadModel, a ScalarHeadModel, or a sequence or
            token classification model with one label shares them too; one whose backbone is that
            of `tuned` is served by its forwards. Anything else is a ValueFunction, such as a
            TextValueModel, and scores texts.
        tokenizers: of the other roles that have their own, by role: its chat template and special
            tokens then hold for that role. The pair's name the same pieces by the same ids.
        templates: by role, the Template, or its name (see ivg_fast.templates.TEMPLATES), through
            which that role reads the text of a prompt.
        guide_vocabulary: "same": the pair's token ids are the base's, or it is refused;
            "shared_pieces": else ids of the same piece are guided, the others left alone (see
            SharedPieces for what that costs); tokenizers of the pair are needed.
        min_shared_pieces: the least share of the base's pieces that such a guide must have.
        config: see EngineConfig.

    Attributes:
        shared_pieces: by role, the share that a guide with another vocabulary has.

    Raises:
        InvalidParameterError: an argument that cannot be, by name.
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
        tokenizers: Mapping[str, Any] | None = None,
        templates: Mapping[str, str | Template] | None = None,
        guide_vocabulary: GuideVocabulary = "same",
        min_shared_pieces: float = 0.5,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = EngineConfig() if config is None else config
        if not isinstance(self.config, EngineConfig):
            raise InvalidParameterError("config", config, "must be an EngineConfig")
        checked_guide_vocabulary(guide_vocabulary, min_shared_pieces)
        self._min_share = min_shared_pieces if guide_vocabulary == "shared_pieces" else None
        self.shared_pieces: dict[str, float] = {}
        self.tokenizer = tokenizer
        of_value = value.tokenizer if isinstance(value, TextValueModel) else None
        self._tokenizers = tokenizers_by_role(tokenizer, tokenizers, of_value)
        self._renderer = PromptRenderer(self._tokenizers, templates)
        check_pair(tuned, untuned)
        self._value = ExplicitValue()
        if value is not None and not isinstance(value, nn.Module):
            check_function(value)
            self._value, value = ExplicitValue("text", function=value), None
        elif value is not None:
            value = as_value_model(value)
        models: dict[str, Any] = {
            "base": base_model,
            "tuned": tuned,
            "untuned": untuned,
            "value": value,
        }
        self._runners: dict[str, ModelRunner] = {}
        self._device = device_of(base_model)
        try:
            for role, model in models.items():
                if model is None and role != "base":
                    continue
                check_placed(model, role, self._device)
                with on_device(self._device):
                    self._runners[role] = ModelRunner(
                        model, role=role, can_compile=self.config.compile
                    )
            with on_device(self._device):
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
        templates: Mapping[str, str | Template] | None = None,
        guide_vocabulary: GuideVocabulary = "same",
        min_shared_pieces: float = 0.5,
        model_kwargs: Mapping[str, Any] | None = None,
        config: EngineConfig | None = None,
    ) -> Self:
        """Loads every model from a folder (or hub name) in safetensors; checks the vocabularies.

        Args:
            base, tuned, untuned: causal language models with their tokenizers, or folders of PEFT
                adapters of such.
            value: a value model (see `load_value_model`). Where its tokenizer is not the base's it
                becomes a TextValueModel. A function of one's own goes to the constructor.
            device: "cpu" (also for None) or "cuda", of all models.
            dtype: "auto": the checkpoint's; float16 becomes float32 on the CPU.
            templates, guide_vocabulary, min_shared_pieces: as for the constructor; each role has
                the tokenizer beside its weights.
            model_kwargs: more arguments for loading the language models (see `load_model`). Under
                the key "base", "tuned" or "untuned": those of this role alone.
            config: see EngineConfig.

        Raises:
            As the constructor; OSError or InvalidParameterError where a checkpoint cannot be read.
            Whether all of them are there is checked before the first one is loaded.
        """
        device = checked_device(device)
        paths = dict(zip(ROLES, (base, tuned, untuned, value), strict=True))
        models, tokenizers = load_roles(
            paths,
            device=device,
            dtype=dtype,
            model_kwargs=model_kwargs,
            can_differ=guide_vocabulary == "shared_pieces",
        )
        return cls(
            models.pop("base"),
            tokenizers.pop("base"),
            tokenizers=tokenizers,
            templates=templates,
            guide_vocabulary=guide_vocabulary,
            min_shared_pieces=min_shared_pieces,
            config=config,
            **models,
        )

    def _set_up(self) -> None:
        base = self._runners["base"]
        if "value" in self._runners:
            value, tuned = self._runners["value"], self._runners.get("tuned")
            is_shared = tuned is not None and value.shares_trunk_with(tuned)
            if tuned is not None and is_shared:
                if self.config.compile:
                    raise InvalidParameterError(
                        "compile", True, "must be False where value shares the trunk of tuned"
                    )
                value.share_pools(tuned)
            self._value = ExplicitValue("scalar" if value.is_scalar else "vocabulary", is_shared)
        if self._min_share is not None:
            self.shared_pieces = share_pieces(
                self._runners, self._tokenizers, self._min_share, self._renderer.put_behind
            )
        own = {role: t for role, t in self._tokenizers.items() if role not in self.shared_pieces}
        self.vocab_size = shared_vocab_size(
            self.tokenizer,
            base.vocab_size,
            own,
            {r: x.vocab_size for r, x in self._runners.items()},
        )
        eos_ids, eos_id = ends_of_text(self.tokenizer, base.eos_token_ids, self.vocab_size)
        runners = list(self._runners.values())
        num_blocks = allocate_pools(runners, self.config, self._value.function)
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
        burst = BurstRunner(
            self._runners,
            self.vocab_size,
            BlockCopier(pools).copy,
            token_scorer,
            self.tokenizer,
            StaticBursts.of_engine(self._runners, self.vocab_size, token_scorer, self.config),
        )
        scorer = partial(ChunkScorer, self._runners, token_scorer, eos_id, self.tokenizer)
        self._loop = RequestLoop(self._scheduler, burst, scorer, self.tokenizer, self.config)
        self._factory = RequestFactory(
            self._runners,
            self.tokenizer,
            self._renderer,
            self.vocab_size,
            self.config,
            eos_ids,
            eos_id,
            self._value,
        )

    # --- requests --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SearchParams | Sequence[SearchParams],
        *,
        seeds: Sequence[int] | None = None,
        use_tqdm: bool = False,
        on_ended: Callable[[int, RequestOutput | BaseException], object] | None = None,
    ) -> list[RequestOutput]:
        """Decodes prompts together.

        Args:
            prompts: a text, chat messages, token ids, a Prompt, or a list of these.
            params: for all prompts, or one each.
            seeds: one a prompt. Without it, prompt i of one params object with a seed draws from a
                seed derived from (seed, i), that of i = 0 being the seed itself.
            use_tqdm: show a progress bar on stderr.
            on_ended: called with a prompt's index and its output, or what it failed with, as soon
                as it has ended.

        Returns:
            One RequestOutput a prompt, in their order.

        Raises:
            IVGError: bad input is refused before anything runs.
            Exception: a request failed while it ran. The others finish first; `outputs` of the
                error, whatever its type, holds what they returned, None for those that failed,
                and `failures` what each of these failed with, by index.
        """
        self._check_usable()
        requests = self._factory.create(as_prompt_list(prompts), params, seeds)
        return self._loop.run_all(requests, use_tqdm, on_ended)

    def add_request(
        self,
        prompt: PromptInput,
        params: SearchParams,
        *,
        seed: int | None = None,
        is_streamed: bool = False,
    ) -> int:
        """Queues one prompt and returns its request id; `step` runs it.

        `is_streamed`: with a single candidate, in bursts of `max_stream_steps` at most.

        Raises:
            InvalidParameterError, CapacityError, QueueFullError: the request is not queued.
        """
        self._check_open()
        (request,) = self._factory.create([prompt], params, None if seed is None else [seed])
        if is_streamed and params.pool_size == 1:
            request.max_burst_steps = self.config.max_stream_steps
        return self._loop.submit(request)

    def abort(self, request_id: int) -> bool:
        """Ends a request; the next step returns what it has. False if it has ended already, and
        where the engine is closed.

        Raises:
            InvalidParameterError: `request_id` is no integer.
        """
        check_integer("request_id", request_id, -(2**63))
        return bool(self._runners) and self._loop.abort(request_id)

    def take_decided(self, request_id: int) -> list[int]:
        """Tokens decided since the last call: every surviving candidate shares them, so the output
        will too. None of them once the request has ended; its output has the rest."""
        return self._scheduler.take_decided(request_id).tolist()

    def step(self) -> list[Ended]:
        """Runs one burst and the scoring behind it; or waits, where all that is left are calls of
        scorers on their threads.

        Returns:
            The requests that ended: (request id, output, or the error that it failed with).
        """
        self._check_usable()
        return self._loop.step()

    def _check_open(self) -> None:
        if not self._runners:
            raise IVGError("the engine is closed")

    def _check_usable(self) -> None:
        self._check_open()
        if self._loop.is_called_by_a_scorer:
            raise IVGError("a scorer cannot run or close the engine that waits for its scores")

    @property
    def has_room(self) -> bool:
        """Whether one more request may wait."""
        return bool(self._runners) and self._loop.has_room

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to run or to return."""
        return self._loop.has_unfinished

    def warmup(self) -> None:
        """Runs small requests of every kind that the models serve, so that the first real one pays
        for no lazy work: with `compile`, minutes of it. Leaves nothing behind but that. A
        ValueFunction given as `value` is called too, with a few short texts.

        Raises:
            Exception: what a request would raise, such as UnsupportedModelError of a model that
                cannot be compiled.
        """
        self._check_usable()
        warm_up(self)

    def can_serve(self, params: SearchParams) -> bool:
        """Whether a request with these would be accepted; False where the engine is closed."""
        try:
            self.check_request(WARMUP_PROMPT, params)
        except IVGError:
            return False
        return True

    def check_request(self, prompt: PromptInput, params: SearchParams) -> None:
        """Raises what `add_request` would, a full queue aside; queues nothing."""
        self._check_open()
        self._loop.check(self._factory.create([prompt], params, None))

    def use_scorer_threads(self) -> None:
        """Has callables run on threads of their own, also without a `scorer_timeout_s`.

        Raises:
            IVGError: the engine is closed, or has requests.
        """
        self._check_open()
        if self.has_unfinished:
            raise IVGError("an engine with requests cannot change how they are scored")
        self._loop.use_scorer_threads(self.config.scorer_timeout_s)

    # --- life ------------------------------------------------------------------------------------

    def hold(self) -> AbstractContextManager[None]:
        """A block in which no other thread runs or closes this engine, between its steps either.

        Raises:
            IVGError: as the block begins: another thread runs or holds it.
        """
        return self._loop.steps

    def stats(self) -> dict[str, int]:
        """What waits, runs and is held now: counts of requests, rows and KV blocks."""
        return self._scheduler.stats()

    def check_integrity(self) -> None:
        """Raises RuntimeError if the books of the scheduler and the KV pool disagree."""
        self._scheduler.check_integrity()

    def release_models(self) -> None:
        """Gives the models back as they were until the engine's next forward: meanwhile they run
        by themselves and, without requests under way, their weights may change."""
        for runner in reversed(self._runners.values()):
            runner.release()

    def close(self, *, keep_value: bool = False) -> None:
        """Frees the KV pools and gives the models their own attention back; twice is fine.

        Closes the ValueFunction that was given as `value`, if it has `close()`; not so with
        `keep_value`, where it is for others too. Requests that have not ended are dropped.

        Raises:
            IVGError: one of its scorers calls, or a thread while another one runs it.
        """
        if not self._runners or not hasattr(self, "_loop"):
            self._close(keep_value)
            return
        self._check_usable()
        with self._loop.steps:
            self._close(keep_value)
            self._loop.close()

    def _close(self, keep_value: bool) -> None:
        close_value = getattr(self._value.function, "close", None)
        self._value = ExplicitValue()
        if close_value is not None and not keep_value:
            close_value()
        # The first of several roles that share a module saw its own attention: it goes last.
        for runner in reversed(self._runners.values()):
            runner.close()
        self._runners = {}

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _or_minus_one(value: int | None) -> int:
    return -1 if value is None else value
