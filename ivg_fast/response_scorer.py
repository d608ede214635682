# SPDX-License-Identifier: Apache-2.0
"""ResponseScorer: what the value functions say of responses that are there already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ivg_fast.errors import CapacityError, InvalidParameterError, IVGError, ScorerError
from ivg_fast.models import support
from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch
from ivg_fast.models.checkpoints import check_checkpoints, check_pair
from ivg_fast.models.loading import kwargs_of, load_model, load_tokenizer
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.text_value import TextValueModel, check_function, load_value
from ivg_fast.models.value_head import as_value_model
from ivg_fast.models.values import TokenScorer, ValueFunction, call_scorer
from ivg_fast.models.vocabulary import load_guide_tokenizer, shared_vocab_size
from ivg_fast.params import Guidance, ScoreInput, Scorer, check_integer
from ivg_fast.rendering import PromptInput, PromptRenderer, checked_token_id, tokenizers_by_role
from ivg_fast.request import GUIDES, decode
from ivg_fast.templates import Template

Floats = NDArray[np.float64]


class ResponseScorer:
    """Scores given responses as an engine's scorer scores what it has sampled; needs no base model.

    A response is tokenised by itself and put behind the prompt's tokens, as sampled tokens are; a
    value that scores texts reads prompt + response as one. Every text is computed whole.

    Args:
        tokenizer: the base model's, whose ids the responses are; None if all is token ids.
        tuned, untuned: the pair of "implicit"; both or none.
        value: of "explicit": a model or ValueFunction, as for an Engine.
        tokenizers, templates: by role, as for an Engine.
        max_batch_tokens: tokens of one forward, but at least one text. The logits of a pair take
            twice that many rows of a vocabulary.

    Raises:
        As the constructor of an Engine.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        tuned: nn.Module | None = None,
        untuned: nn.Module | None = None,
        value: nn.Module | ValueFunction | None = None,
        tokenizers: Mapping[str, Any] | None = None,
        templates: Mapping[str, str | Template] | None = None,
        max_batch_tokens: int = 2048,
    ) -> None:
        check_pair(tuned, untuned)
        check_integer("max_batch_tokens", max_batch_tokens, 1)
        self._max_batch_tokens = max_batch_tokens
        self._tokenizer = tokenizer
        of_value = value.tokenizer if isinstance(value, TextValueModel) else None
        by_role = tokenizers_by_role(tokenizer, tokenizers, of_value)
        self._has_tokenizers = any(own is not None for own in by_role.values())
        self._renderer = PromptRenderer(by_role, templates)
        self._function: ValueFunction | None = None
        if value is not None and not isinstance(value, nn.Module):
            check_function(value)
            self._function, value = value, None
        self._runners: dict[str, ModelRunner] = {}
        self._is_closed = False
        try:
            for role, model in (("tuned", tuned), ("untuned", untuned), ("value", value)):
                if model is not None:
                    if not isinstance(model, nn.Module):
                        raise InvalidParameterError(role, model, "must be a torch module")
                    support.check_on_cpu(model, role)
                    model = as_value_model(model) if role == "value" else model
                    self._runners[role] = ModelRunner(model, role=role)
            sizes = {role: runner.vocab_size for role, runner in self._runners.items()}
            num_ids = max(sizes.values(), default=0)
            self._vocab_size = shared_vocab_size(tokenizer, num_ids, by_role, sizes)
        except BaseException:
            self._function = None  # it stays as it was given
            self.close()
            raise
        self._measure = TokenScorer(self._runners, self._vocab_size)
        eos = [getattr(tokenizer, "eos_token_id", None)]
        eos += [token for runner in self._runners.values() for token in runner.eos_token_ids]
        self._eos_id = next((token for token in eos if token is not None), None)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] | None = None,
        tuned: str | os.PathLike[str] | None = None,
        untuned: str | os.PathLike[str] | None = None,
        value: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        templates: Mapping[str, str | Template] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        max_batch_tokens: int = 2048,
    ) -> Self:
        """Loads value functions from folders or hub names.

        Args:
            base: whose token ids the responses are; only its tokenizer is read. None: that of
                `tuned`, else of `value`. A value whose tokenizer is another scores texts.
            tuned, untuned, value, dtype, templates, model_kwargs: as of Engine.from_pretrained.
            max_batch_tokens: as for the constructor.

        Raises:
            As Engine.from_pretrained.
        """
        paths = {"base": base, "tuned": tuned, "untuned": untuned, "value": value}
        check_checkpoints(paths, model_kwargs)
        role = next((role for role, path in paths.items() if path is not None), None)
        tokenizer = None
        if role is not None:
            tokenizer = load_tokenizer(paths[role], kwargs_of(role, model_kwargs))  # type: ignore[arg-type]
        models: dict[str, Any] = {}
        tokenizers = {}
        for role in ("tuned", "untuned"):
            path, own = paths[role], kwargs_of(role, model_kwargs)
            if path is not None:
                tokenizers[role] = load_guide_tokenizer(tokenizer, path, role, own)
                models[role] = load_model(path, dtype=dtype, model_kwargs=own)
        if value is not None:
            models["value"], tokenizers["value"] = load_value(value, tokenizer, dtype=dtype)
        return cls(
            tokenizer,
            tokenizers={role: own for role, own in tokenizers.items() if own is not None},
            templates=templates,
            max_batch_tokens=max_batch_tokens,
            **models,
        )

    def score(
        self,
        prompts: Sequence[PromptInput],
        responses: Sequence[str | Sequence[int]],
        scorer: Guidance | Scorer,
        *,
        ends_text: bool | Sequence[bool] = False,
    ) -> list[float]:
        """The score of each response: of its last prefix, as at an engine's selection.

        Args:
            prompts: one a response, in any form that an engine takes.
            responses: texts or token ids.
            scorer: "implicit": sum of log tuned - log untuned; "explicit": the value; or a callable
                of list[ScoreInput].
            ends_text: for all, or one each: whether an end of text is read behind the response. Ids
                that end in one have it already.

        Raises:
            InvalidParameterError, CapacityError: about any of them; nothing has been computed then.
            ScorerError: a callable failed, or a score is not finite.
        """
        if self._is_closed:
            raise IVGError("the scorer is closed")
        _check_list("prompts", prompts)
        _check_list("responses", responses)
        count = len(prompts)
        if len(responses) != count:
            raise InvalidParameterError("responses", len(responses), f"must be {count}")
        ends = [ends_text] * count if isinstance(ends_text, bool) else ends_text
        _check_list("ends_text", ends)
        if len(ends) != count or not all(isinstance(end, bool | np.bool_) for end in ends):
            raise InvalidParameterError("ends_text", ends, f"must be a bool, or {count} of them")
        ends = [bool(end) for end in ends]
        function = self._text_function(scorer)
        if function is not None:
            role = "base" if callable(scorer) else "value"
            inputs = [
                self._text_input(role, *item) for item in zip(prompts, responses, ends, strict=True)
            ]
            return call_scorer(function, inputs).tolist() if inputs else []
        roles = GUIDES[scorer]  # type: ignore[index]
        texts = [
            self._of_roles(roles, *item) for item in zip(prompts, responses, ends, strict=True)
        ]
        found: list[Floats] = [np.empty(0)]
        for begin, end in self._batches([max(len(ids) for ids, _ in text) for text in texts]):
            found.append(self._of_batch(roles, texts[begin:end]))
        scores = np.concatenate(found)
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ScorerError(
                f"scorer {scorer!r} must give finite scores, got {scores[bad]} for input {bad}"
            )
        return scores.tolist()

    def close(self) -> None:
        """Frees what it holds and gives the models their own attention back; twice is fine. Closes
        the ValueFunction that was given as `value`, if it has `close()`."""
        self._is_closed = True
        close_value = getattr(self._function, "close", None)
        self._function = None
        if close_value is not None:
            close_value()
        for runner in reversed(self._runners.values()):
            runner.close()
        self._runners = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text_function(self, scorer: Guidance | Scorer) -> Scorer | None:
        if callable(scorer):
            return scorer
        if scorer not in ("implicit", "explicit"):
            raise InvalidParameterError(
                "scorer", scorer, "must be 'implicit', 'explicit' or a callable"
            )
        if scorer == "explicit" and self._function is not None:
            return self._function
        missing = [role for role in GUIDES[scorer] if role not in self._runners]
        if missing:
            raise InvalidParameterError(
                "scorer", scorer, f"needs {' and '.join(missing)}, which was not given"
            )
        return None

    def _ids(self, response: str | Sequence[int]) -> list[int]:
        if not isinstance(response, str):
            if not isinstance(response, Sequence | np.ndarray) or isinstance(response, bytes):
                raise InvalidParameterError("responses", response, "must be texts or token ids")
            return [checked_token_id("responses", token) for token in response]
        if self._tokenizer is None:
            raise InvalidParameterError("responses", response, "need a tokenizer")
        return list(self._tokenizer(response, add_special_tokens=False).input_ids)

    def _text_input(
        self, role: str, prompt: PromptInput, response: str | Sequence[int], ends_text: bool
    ) -> ScoreInput:
        is_text = isinstance(response, str)
        if is_text and isinstance(prompt, str) and not self._has_tokenizers:
            return ScoreInput(prompt, str(response), (), ends_text, ends_text)
        rendered = self._renderer.render(prompt, [role])[role]
        text = rendered.text
        if text is None:
            if self._tokenizer is None:
                raise InvalidParameterError("prompts", prompt, "need a tokenizer to become texts")
            text = decode(self._tokenizer, rendered.token_ids.tolist())
        ids = () if is_text and self._tokenizer is None else tuple(self._ids(response))
        said = str(response) if is_text else decode(self._tokenizer, ids)
        ended = ends_text or (bool(ids) and ids[-1] == self._eos_id)
        return ScoreInput(text, said, ids, ended, ended)

    def _of_roles(
        self,
        roles: Sequence[str],
        prompt: PromptInput,
        response: str | Sequence[int],
        ends_text: bool,
    ) -> list[tuple[list[int], int]]:
        """What each role reads: token ids, how many of them are the response."""
        ids = self._ids(response)
        if ends_text and (not ids or ids[-1] != self._eos_id):
            if self._eos_id is None:
                raise InvalidParameterError(
                    "ends_text", True, "needs a model or tokenizer that has an end of text"
                )
            ids = [*ids, self._eos_id]
        if not ids:
            raise InvalidParameterError("responses", response, "must have a token")
        rendered = self._renderer.render(prompt, roles)
        texts = []
        for role in roles:
            before, runner = rendered[role].token_ids.tolist(), self._runners[role]
            if not before:
                raise InvalidParameterError("prompts", prompt, f"must have a token for {role}")
            for name, tokens, limit in (
                ("prompts", before, runner.vocab_size),
                ("responses", ids, self._vocab_size),
            ):
                unknown = [token for token in tokens if not 0 <= token < limit]
                if unknown:
                    raise InvalidParameterError(
                        name, unknown[0], f"must be token ids of {role}, in [0, {limit})"
                    )
            texts.append((before + ids, len(ids)))
            if runner.max_position is not None and len(texts[-1][0]) > runner.max_position:
                raise CapacityError(
                    f"a prompt of {len(before)} tokens and a response of {len(ids)} exceed the "
                    f"{runner.max_position} positions of {role}"
                )
        return texts

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        begin, size = 0, 0
        for i, length in enumerate(lengths):
            if size and size + length > self._max_batch_tokens:
                yield begin, i
                begin, size = i, 0
            size += length
        if size:
            yield begin, len(lengths)

    def _of_batch(
        self, roles: Sequence[str], texts: Sequence[list[tuple[list[int], int]]]
    ) -> Floats:
        """float64 [B]; `texts` has for each its roles' tokens."""
        counts = [text[0][1] for text in texts]
        if roles == GUIDES["explicit"]:
            whole = [text[0][0] for text in texts]
            if self._runners["value"].is_scalar:
                return self._measure.scalars(self._forward("value", whole))
            states = self._forward("value", [ids[:-1] for ids in whole])
            last = np.array([ids[-1] for ids in whole])
            return self._measure.scores("explicit", [states], np.arange(len(whole)), last)
        # The last token itself is not read: nothing stands behind it.
        outputs = [
            self._forward(role, [text[i][0][:-1] for text in texts], counts)
            for i, role in enumerate(roles)
        ]
        tokens = np.concatenate([text[0][0][-text[0][1] :] for text in texts])
        measured = self._measure.scores("implicit", outputs, np.arange(len(tokens)), tokens)
        starts = np.cumsum([0, *counts[:-1]])
        return np.add.reduceat(measured, starts)

    def _forward(
        self, role: str, texts: Sequence[list[int]], num_wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The outputs of the last tokens of texts: hidden states of a value, logits of others."""
        runner = self._runners[role]
        bounds = np.cumsum([0, *(-(-len(ids) // BLOCK_SIZE) for ids in texts)])
        if bounds[-1] > runner.num_blocks:
            runner.allocate(int(bounds[-1]))
        tables = [list(range(a, b)) for a, b in pairwise(bounds.tolist())]
        batch = ForwardBatch.of_texts(texts, tables, num_wanted=num_wanted, device=runner.device)
        return runner.hidden(batch) if role == "value" else runner.forward(batch)


def _check_list(name: str, values: Any) -> None:
    is_list = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str | bytes)
    if not is_list:
        raise InvalidParameterError(name, values, "must be a list")
