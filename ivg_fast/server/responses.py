# SPDX-License-Identifier: Apache-2.0
"""From outputs to the bodies of responses, whole or in chunks.

Beside OpenAI's fields each choice has "ivg", what the search says of it, and a whole response (or
the chunk behind a prompt's last) "ivg" too: seeds and counters by prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ivg_fast.outputs import CandidateOutput, RequestOutput, SearchStats
from ivg_fast.request import decode

# OpenAI has no word for what ends at a deadline, or was cut off by others that had won.
_REASONS = {"stop": "stop", "length": "length", "deadline": "length", "abort": "length"}


class Responses:
    """Writes the responses to one request.

    Args:
        model: its name.
        num_outputs: n, choices a prompt at most; choice j of prompt i has index i*n + j.
        tokenizer: the base model's.
        is_chat: which kind of request it is.
        wants_logprobs: whether choices carry the log-probabilities of their tokens.
    """

    def __init__(
        self, model: str, num_outputs: int, tokenizer: Any, *, is_chat: bool, wants_logprobs: bool
    ) -> None:
        self._model = model
        self._num_outputs = num_outputs
        self._tokenizer = tokenizer
        self.is_chat = is_chat
        self._wants_logprobs = wants_logprobs
        self._id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response that is no stream."""
        choices = []
        for i, output in enumerate(outputs):
            for j, candidate in enumerate(output.outputs):
                choice = self._ended(i, j, candidate)
                if self.is_chat:
                    choice["message"] = {"role": "assistant", "content": candidate.text}
                else:
                    choice["text"] = candidate.text
                choices.append(choice)
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": choices,
            "usage": usage_of(outputs),
            "ivg": [_search_info(output) for output in outputs],
        }

    def role(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        return self._chunk({**self._running(index, ""), "delta": {"role": "assistant"}})

    def piece(self, prompt: int, text: str) -> dict[str, Any]:
        """A chunk of the best response to a prompt."""
        return self._chunk(self._running(prompt * self._num_outputs, text))

    def last(self, prompt: int, text: str, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The chunks that end the choices of a prompt. `text`: what is left of the best one's; the
        others come whole, as only the end decides them."""
        for j, candidate in enumerate(output.outputs):
            index = prompt * self._num_outputs + j
            if j > 0 and self.is_chat:
                yield self.role(index)
            rest = candidate.text if j > 0 else text
            if rest and self.is_chat:
                yield self._chunk(self._running(index, rest))
            chunk = self._ended(prompt, j, candidate)
            if self.is_chat:
                chunk["delta"] = {}
            else:
                chunk["text"] = rest
            yield {**self._chunk(chunk), "ivg": _search_info(output)}

    def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The chunk behind the last one, where usage is asked for."""
        return {**self._chunk(), "usage": usage_of(outputs)}

    def _running(self, index: int, text: str) -> dict[str, Any]:
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": None}

    def _ended(self, prompt: int, rank: int, candidate: CandidateOutput) -> dict[str, Any]:
        return {
            "index": prompt * self._num_outputs + rank,
            "logprobs": self._logprobs(candidate) if self._wants_logprobs else None,
            "finish_reason": _REASONS[candidate.finish_reason],
            "ivg": _candidate_info(candidate),
        }

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": list(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _logprobs(self, candidate: CandidateOutput) -> dict[str, Any]:
        tokens = [decode_piece(self._tokenizer, token) for token in candidate.token_ids]
        logprobs = candidate.token_logprobs or []
        if not self.is_chat:
            ends = itertools.accumulate(map(len, tokens), initial=0)
            return {
                "tokens": tokens,
                "token_logprobs": logprobs,
                "top_logprobs": None,
                "text_offset": list(ends)[:-1],
            }
        content: list[dict[str, Any]] = [
            {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Tokens of the base model's prompts and of the choices that are returned."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def decode_piece(tokenizer: Any, token: int) -> str:
    """The text of one token by itself; "" without a tokenizer."""
    return decode(tokenizer, [token])


_CANDIDATE_FIELDS = tuple(f.name for f in dataclasses.fields(CandidateOutput) if f.name != "text")
_STATS_FIELDS = tuple(field.name for field in dataclasses.fields(SearchStats))


def _candidate_info(candidate: CandidateOutput) -> dict[str, Any]:
    return _fields(candidate, _CANDIDATE_FIELDS)


def _search_info(output: RequestOutput) -> dict[str, Any]:
    return {"seed": output.seed, "stats": _fields(output.stats, _STATS_FIELDS)}


def _fields(of: Any, names: Sequence[str]) -> dict[str, Any]:
    """Not dataclasses.asdict, which copies every list: the event loop has better to do."""
    return {name: getattr(of, name) for name in names}
