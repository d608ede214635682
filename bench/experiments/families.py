# SPDX-License-Identifier: Apache-2.0
"""What an experiment runs on: models by role, their templates, the gold reward, prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoConfig

from ivg_fast.assets import imdb_path
from ivg_fast.errors import InvalidParameterError
from ivg_fast.rendering import Prompt
from ivg_fast.request import ROLES
from ivg_fast.templates import Template, preset
from ivg_fast.training.records import read_jsonl

SPLITS = ("dev", "test")


@dataclass(frozen=True, slots=True)
class Family:
    """Models and gold reward: folders, or names on a hub.

    Attributes:
        name: what the results call it.
        models: by role.
        gold: an .npz of GoldReward, or a classifier of two labels (negative, positive).
        templates: prompt templates, or their names, by role; a role without one reads the raw
            prompt.
    """

    name: str
    models: Mapping[str, str]
    gold: str
    templates: Mapping[str, str | Template] = field(default_factory=dict)

    def describe(self) -> dict[str, object]:
        """What of a family decides a response: weights and templates by role."""
        return {
            "models": {role: fingerprint(self.models[role], role) for role in ROLES},
            "templates": {
                role: one if isinstance(one, str) else asdict(one)
                for role, one in sorted(self.templates.items())
            },
        }


def bundled() -> Family:
    """The IMDB family that ships with the package."""
    folder = imdb_path()
    return Family(
        "bundled",
        {role: str(folder / role) for role in ROLES},
        str(folder / "gold_reward.npz"),
    )


PAPER_BASES = ("gpt2-large", "gpt2", "gpt2-xl")


def paper(base: str = PAPER_BASES[0]) -> Family:
    """The models of the paper's controlled-sentiment experiment (arXiv 2409.17819), from a hub."""
    chosen = preset("imdb", base=base)
    return Family(f"paper, {base}", chosen.models, "lvwerra/distilbert-imdb", chosen.templates)


def fingerprint(source: str, role: str = "model") -> str:
    """Tells checkpoints apart: a hash of a folder's or file's content, or the hub's commit.

    Raises:
        InvalidParameterError: names the role, where nothing is there or the hub is out of reach.
    """
    wanted = "must be a folder, a file or a hub name"
    path = Path(source)
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.json")])
    elif path.is_file():
        files = [path]
    else:
        try:
            commit = getattr(AutoConfig.from_pretrained(source), "_commit_hash", None)
        except (OSError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise InvalidParameterError(role, source, f"{wanted} ({why})") from error
        if commit is None:
            raise InvalidParameterError(role, source, wanted)
        return f"{source}@{commit}"
    if not files:
        raise InvalidParameterError(role, source, "must hold safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The raw prompts of a split, in their order; by prompt, where there are any: references, and
    what the value reads instead."""

    split: str
    texts: tuple[str, ...]
    references: Mapping[str, str] = field(default_factory=dict)
    value_texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        own = [(text, self.value_texts.get(text)) for text in self.texts]
        read = [*self.texts, *(f"{text}\0{value}" for text, value in own if value is not None)]
        return hashlib.sha256("\n".join(read).encode()).hexdigest()[:16]

    def for_engine(self, text: str) -> Prompt:
        return Prompt(text, value=self.value_texts.get(text))

    def first(self, count: int) -> list[str]:
        if not 1 <= count <= len(self.texts):
            raise InvalidParameterError(
                f"number of {self.split} prompts", count, f"must be in [1, {len(self.texts)}]"
            )
        return list(self.texts[:count])


def load_prompts(path: str | None = None) -> dict[str, Prompts]:
    """The prompts of both splits, of JSON lines {"split", "prompt"}; None: those that ship.

    A "gist" beside a prompt is its reference, a "value" what the value reads instead.

    Raises:
        InvalidParameterError: a prompt is in both splits.
    """
    source = path or imdb_path() / "prompts.jsonl"
    records = read_jsonl(source, {"split": str, "prompt": str})
    splits: dict[str, Sequence[str]] = {
        split: [r["prompt"] for r in records if r["split"] == split] for split in SPLITS
    }
    shared = set(splits["dev"]) & set(splits["test"])
    if shared:
        raise InvalidParameterError("prompts", min(shared), "must not be in both dev and test")
    references, value_texts = (
        {r["prompt"]: r[name] for r in records if name in r} for name in ("gist", "value")
    )
    return {
        split: Prompts(split, tuple(texts), references, value_texts)
        for split, texts in splits.items()
    }
