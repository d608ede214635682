# SPDX-License-Identifier: Apache-2.0
"""What a request asks for (SearchParams) and how an engine is laid out (EngineConfig)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ivg_fast._C import BLOCK_SIZE
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._sample_args import MIN_TEMPERATURE

Guidance = Literal["none", "implicit", "explicit"]
GUIDANCE_KINDS = ("none", "implicit", "explicit")


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """What a scorer callable sees of one candidate.

    Attributes:
        prompt: the prompt's text, decoded from the ids where ids were given: the value role's for
            an engine's `value`, the base model's for a scorer of SearchParams.
        response: the text so far, a stop string included, special tokens left out.
        token_ids: the response's token ids.
        is_finished: whether the candidate has ended (end of text, stop string or length).
        ends_text: whether a scorer is to read an end of text behind the response: one was sampled
            (or another stop token), a stop string ended it, or `score_eos_on_truncation` asks so.
    """

    prompt: str
    response: str
    token_ids: tuple[int, ...]
    is_finished: bool
    ends_text: bool = False


Scorer = Callable[[list[ScoreInput]], Sequence[float]]


# Of W, K, L, T and n: no product of two overflows, and no larger value makes sense.
_MAX_COUNT = 2**24


def check_integer(name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> None:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or not minimum <= value <= maximum:
        raise InvalidParameterError(name, value, f"must be an integer in [{minimum}, {maximum}]")


def check_number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not (low < value if open_low else low <= value) or not value <= high:
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        raise InvalidParameterError(name, value, f"must be a number in {bounds}")


def is_whole_text(text: str) -> bool:
    """Whether it has no lone surrogates, which stand for no character and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidParameterError(name, value, "must be True or False")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """How one prompt is decoded: the tilt of each token, the search over chunks, the sampling.

    The grid of Integrated Value Guidance (arXiv 2409.17819): `guidance` tilts every next-token
    distribution, `scorer` ranks the candidates at the end of each chunk. IVG is
    (implicit, explicit), EFT (implicit, none), weak-to-strong search (none, implicit).

    Attributes:
        max_tokens: response tokens at most.
        beam_width: W, candidates that survive a selection.
        num_candidates: K, continuations of each survivor. W*K candidates run at a time.
        chunk_length: L, tokens between two selections; None: one chunk (best of W*K). With a single
            candidate (W*K = 1) there is nothing to select and chunks have no effect.
        guidance: "none"; "implicit": z = base + w * (tuned - untuned); "explicit": z = base +
            w * value.
        guidance_weight: w; may be negative.
        scorer: "none"; "implicit": sum of log tuned - log untuned; "explicit": the value model; or
            a callable of list[ScoreInput] that returns one finite number each.
        temperature: of the combined logits; 0: greedy.
        top_k: 0 or -1: no limit.
        top_p: in (0, 1]; 1: no limit. Filters apply in the order top-k, top-p, min-p.
        min_p: in [0, 1]: the least probability, as a share of the largest; 0: no limit.
        min_tokens: no stop token is sampled, and no stop string looked for, before that many
            tokens.
        stop: a string or strings that end a response; the text is cut before them.
        stop_token_ids: token ids that end a response, beside the tokenizer's end of text.
        ignore_eos: end of text is an ordinary token.
        seed: of the random numbers, in [0, 2^64); None: drawn, and returned with the output.
        n: outputs to return, best first; at most W*K.
        logprobs: whether outputs carry `token_logprobs` and `token_rewards`.
        deadline_s: seconds after which the request ends with what it has; None: never.
        score_eos_on_truncation: a candidate cut at max_tokens is scored with an end of text behind
            it.
        dedup_finished: a finished survivor is one candidate of the next selection instead of K
            clones.

    Raises:
        InvalidParameterError: names the field and the value.
    """

    max_tokens: int
    beam_width: int = 1
    num_candidates: int = 1
    chunk_length: int | None = None
    guidance: Guidance = "none"
    guidance_weight: float = 1.0
    scorer: Guidance | Scorer = "none"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    deadline_s: float | None = None
    score_eos_on_truncation: bool = False
    dedup_finished: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beam_width", "num_candidates", "n"):
            check_integer(name, getattr(self, name), 1, _MAX_COUNT)
        if self.chunk_length is not None:
            check_integer("chunk_length", self.chunk_length, 1, _MAX_COUNT)
        check_integer("top_k", self.top_k, -1)
        check_integer("min_tokens", self.min_tokens, 0)
        check_number("guidance_weight", self.guidance_weight, -1e6, 1e6)
        check_number("temperature", self.temperature, 0.0, 1e6)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise InvalidParameterError(
                "temperature", self.temperature, f"must be 0 or at least {MIN_TEMPERATURE}"
            )
        check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        for name in ("ignore_eos", "logprobs", "score_eos_on_truncation", "dedup_finished"):
            _flag(name, getattr(self, name))
        if self.deadline_s is not None:
            check_number("deadline_s", self.deadline_s, 0.0, math.inf)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**64 - 1)
        if self.guidance not in GUIDANCE_KINDS:
            raise InvalidParameterError(
                "guidance", self.guidance, f"must be one of {GUIDANCE_KINDS}"
            )
        if not callable(self.scorer) and self.scorer not in GUIDANCE_KINDS:
            raise InvalidParameterError(
                "scorer", self.scorer, f"must be one of {GUIDANCE_KINDS} or a callable"
            )
        self._freeze_stops()
        self._check_search()

    def _freeze_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
                raise InvalidParameterError(name, value, "must be a sequence")
            object.__setattr__(self, name, tuple(value))
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise InvalidParameterError("stop", self.stop, "must be non-empty strings")
        if not all(is_whole_text(stop) for stop in self.stop):
            raise InvalidParameterError("stop", self.stop, "must have no halves of characters")
        for token in self.stop_token_ids:
            check_integer("stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(int(t) for t in self.stop_token_ids))

    def _check_search(self) -> None:
        pool_size = self.beam_width * self.num_candidates
        if self.n > pool_size:
            raise InvalidParameterError(
                "n", self.n, f"must be at most beam_width * num_candidates = {pool_size}"
            )
        if self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                "min_tokens", self.min_tokens, f"must be at most max_tokens = {self.max_tokens}"
            )
        if self.chunk_length is not None and pool_size > 1 and self.scorer == "none":
            raise InvalidParameterError(
                "scorer", self.scorer, "must be given where chunks are to be selected from"
            )
        if self.temperature == 0 and pool_size > 1:
            raise InvalidParameterError(
                "temperature",
                self.temperature,
                f"must be positive with {pool_size} candidates, which would be identical clones",
            )

    @property
    def pool_size(self) -> int:
        """W*K, the candidates that run at a time."""
        return self.beam_width * self.num_candidates

    @classmethod
    def base(cls, *, max_tokens: int, **options: Any) -> SearchParams:
        """The base model as it is."""
        return cls(max_tokens=max_tokens, **options)

    @classmethod
    def eft(cls, *, max_tokens: int, guidance_weight: float = 1.0, **options: Any) -> SearchParams:
        """Emulated fine-tuning (arXiv 2310.12962): token-wise implicit guidance, no search."""
        return cls(
            max_tokens=max_tokens, guidance="implicit", guidance_weight=guidance_weight, **options
        )

    @classmethod
    def cbs(
        cls,
        *,
        max_tokens: int,
        beam_width: int = 4,
        num_candidates: int = 4,
        chunk_length: int = 5,
        scorer: Guidance | Scorer = "implicit",
        **options: Any,
    ) -> SearchParams:
        """Chunk-level beam search (weak-to-strong search, arXiv 2405.19262), no token guidance."""
        return cls(
            max_tokens=max_tokens,
            beam_width=beam_width,
            num_candidates=num_candidates,
            chunk_length=chunk_length,
            scorer=scorer,
            **options,
        )

    @classmethod
    def ivg(
        cls,
        *,
        max_tokens: int,
        beam_width: int = 4,
        num_candidates: int = 4,
        chunk_length: int = 5,
        guidance_weight: float = 1.0,
        scorer: Guidance | Scorer = "explicit",
        **options: Any,
    ) -> SearchParams:
        """Integrated Value Guidance (arXiv 2409.17819): implicit on tokens, explicit on chunks."""
        return cls.cbs(
            max_tokens=max_tokens,
            beam_width=beam_width,
            num_candidates=num_candidates,
            chunk_length=chunk_length,
            guidance="implicit",
            guidance_weight=guidance_weight,
            scorer=scorer,
            **options,
        )

    @classmethod
    def best_of_n(
        cls,
        num_candidates: int,
        *,
        max_tokens: int,
        scorer: Guidance | Scorer = "explicit",
        **options: Any,
    ) -> SearchParams:
        """The best of `num_candidates` whole responses: CBS(1, N, infinity)."""
        return cls(max_tokens=max_tokens, num_candidates=num_candidates, scorer=scorer, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine uses the machine.

    Attributes:
        num_blocks: KV blocks of 16 tokens, the same ids for every role; None: as many as
            `kv_memory_fraction` allows, but no more than `max_num_rows` rows could fill.
        kv_memory_fraction: share of the free memory (on a GPU: of what the weights leave free) that
            the pools of all roles may take.
        max_num_rows: candidates that run at a time, over all requests.
        max_burst_steps: decode steps between two looks of the host at most. Results do not depend
            on it.
        max_stream_steps: the same for bursts with a streamed request of a single candidate, whose
            tokens come burst by burst: at most that many decode steps and one piece of a prompt lie
            between two events of it. (A search decides tokens at its selections.)
        max_join_steps: a newcomer waits for the boundary of the requests of its chunk length,
            unless that is more steps away than this; None: always.
        max_queued_requests: requests that may wait; None: no limit.
        max_prefill_tokens: prompt tokens that a role reads in one step; longer prompts take several
            steps, between which others decode.
        max_prompt_tokens: longer prompts are refused, in whichever role; None: as long as the
            model's positions and the KV pool allow.
        scorer_timeout_s: seconds that a callable may take for a request's candidates: it runs on a
            thread of its own then, others decode meanwhile, and past that time its request fails
            and the thread is left to itself; None: as long as it takes, on the engine's thread (of
            an AsyncEngine: on one of its own).
        num_threads: CPU threads of a step, of models and kernels; None: torch.get_num_threads().
        compile: run the models through torch.compile: minutes at the start (`Engine.warmup` takes
            them beforehand), shorter steps after it.
        cuda_graphs: on a GPU, replay decode steps as CUDA graphs, captured when their shape first
            comes up; False: the host launches every operator of every step.
    """

    num_blocks: int | None = None
    kv_memory_fraction: float = 0.5
    max_num_rows: int = 256
    max_burst_steps: int = 16
    max_stream_steps: int = 4
    max_join_steps: int | None = None
    max_queued_requests: int | None = None
    max_prefill_tokens: int = 2048
    max_prompt_tokens: int | None = None
    scorer_timeout_s: float | None = None
    num_threads: int | None = None
    compile: bool = False
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check_integer("max_num_rows", self.max_num_rows, 1, _MAX_COUNT)
        check_integer("max_burst_steps", self.max_burst_steps, 1, _MAX_COUNT)
        check_integer("max_stream_steps", self.max_stream_steps, 1, _MAX_COUNT)
        check_integer("max_prefill_tokens", self.max_prefill_tokens, 1, _MAX_COUNT)
        check_number("kv_memory_fraction", self.kv_memory_fraction, 0.0, 1.0, open_low=True)
        _flag("compile", self.compile)
        _flag("cuda_graphs", self.cuda_graphs)
        if self.scorer_timeout_s is not None:
            check_number("scorer_timeout_s", self.scorer_timeout_s, 0.0, 1e6, open_low=True)
        minimums = {
            "num_blocks": 1,
            "max_join_steps": 0,
            "max_queued_requests": 1,
            "max_prompt_tokens": 1,
            "num_threads": 1,
        }
        for name, minimum in minimums.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum, 2**31 // BLOCK_SIZE - 1)
