# SPDX-License-Identifier: Apache-2.0
"""Instructions whose fulfilment a program can check: prompts by template, and their reward.

The kinds are like those of IFEval (arXiv 2311.07911); topics, wordings and checks are our own, and
no prompt is one of IFEval's (`check_disjoint`). A prompt asks for a short text on a topic under one
or two constraints.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.records import Record

REWARD_SCALE = 6.0
MIN_WORDS = 4

TOPICS = (
    "a bakery", "a lighthouse", "a long train ride", "a rainy afternoon", "an old bicycle",
    "autumn leaves", "baking bread", "bees", "camping", "cats", "chess", "city parks", "coffee",
    "collecting stamps", "deserts", "dolphins", "drawing", "electric cars", "fishing", "football",
    "gardening", "glaciers", "hiking", "honey", "a good night's sleep", "jazz", "kites",
    "learning a language", "libraries", "lightning", "maps", "market days", "mountains", "museums",
    "night skies", "olive oil", "owls", "painting a wall", "penguins", "photography", "pianos",
    "rivers", "robots", "running", "sailing", "saving money", "school lunches", "snow", "soup",
    "spiders", "swimming", "tea", "telescopes", "the moon", "the sea", "thunderstorms", "tomatoes",
    "train stations", "umbrellas", "volcanoes", "walking a dog", "whales", "wind", "winter coats",
)  # fmt: skip
_ASKS = (
    "Write one or two sentences about {topic}.",
    "Tell me something about {topic}, briefly.",
    "Describe {topic} in a few words.",
    "Give me a short text on {topic}.",
    "What would you tell a child about {topic}? Be short.",
    "Write a tiny advertisement that has to do with {topic}.",
)
_WORDS = (
    "always", "blue", "bright", "friend", "garden", "gentle", "house", "little", "morning", "never",
    "people", "quiet", "river", "simple", "slowly", "summer", "time", "today", "together", "world",
)  # fmt: skip
_ENDINGS = ("That is all.", "Thank you for reading.", "Enjoy the day!", "What do you think?")


@dataclass(frozen=True, slots=True)
class Constraint:
    """One thing that a response must do. `text` says it; `kind` and `argument` decide it."""

    kind: str
    argument: Any
    text: str

    def holds(self, response: str) -> bool:
        """Whether `response` does it. A blank response does nothing."""
        return bool(response.strip()) and _CHECKS[self.kind](response, self.argument)


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9']+", text)


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if words_of(part)])


def _bullets(text: str) -> int:
    return sum(bool(re.match(r"\s*[*-] *[^*\s-]", line)) for line in text.splitlines())


_CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "lower_case": lambda text, _: text.islower(),
    "upper_case": lambda text, _: text.isupper(),
    "no_comma": lambda text, _: "," not in text,
    "min_sentences": lambda text, count: _sentences(text) >= count,
    "max_words": lambda text, count: len(words_of(text)) <= count,
    "min_words": lambda text, count: len(words_of(text)) >= count,
    "keywords": lambda text, words: set(words) <= {word.lower() for word in words_of(text)},
    "forbidden": lambda text, words: not set(words) & {word.lower() for word in words_of(text)},
    "ending": lambda text, phrase: text.strip().lower().endswith(phrase.lower()),
    "bullets": lambda text, count: _bullets(text) == count,
    "quotation": lambda text, _: bool(re.fullmatch(r'\s*".*"\s*', text, re.DOTALL)),
    "title": lambda text, _: bool(re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text)),
    "postscript": lambda text, _: bool(re.search(r"^\s*P\.\s?S\.", text, re.MULTILINE)),
    "placeholder": lambda text, _: bool(re.search(r"\[[^\[\]]+\]", text)),
}  # fmt: skip
KINDS = tuple(_CHECKS)

# Of a group at most one is asked: they contradict each other, or one gives the other away.
_GROUPS = (
    {"lower_case", "upper_case", "postscript"},
    {"min_sentences", "max_words", "min_words", "bullets"},
    {"ending", "quotation", "postscript", "bullets"},
    {"keywords", "forbidden"},
)


def draw_constraint(kind: str, rng: random.Random) -> Constraint:
    """One of that kind, with an argument and a wording drawn."""
    pair = sorted(rng.sample(_WORDS, 2))
    listed = f'"{pair[0]}" and "{pair[1]}"'
    few, many = rng.randint(2, 4), rng.choice((10, 15, 20, 25))
    ending = rng.choice(_ENDINGS)
    argument, texts = {
        "lower_case": (None, ("Use lower case letters only.", "No letter may be a capital.")),
        "upper_case": (None, ("Use CAPITAL LETTERS only.", "Every letter has to be a capital.")),
        "no_comma": (None, ("Use no commas.", "Do not write a single comma.")),
        "min_sentences": (few, (f"Use {few} sentences or more.",)),
        "max_words": (many, (f"Use {many} words at most.", f"Stay within {many} words.")),
        "min_words": (many, (f"Use {many} words or more.",)),
        "keywords": (pair, (f"Use the words {listed}.", f"The words {listed} must occur.")),
        "forbidden": (
            [pair[0], "the"],
            (f'Avoid the words "{pair[0]}" and "the".', f'Do without "{pair[0]}" and "the".'),
        ),
        "ending": (ending, (f'Close with the words "{ending}"', f'Your last words: "{ending}"')),
        "bullets": (
            few,
            (f"Answer as a list of {few} points, each on a line that begins with *.",),
        ),
        "quotation": (None, ("Put your whole answer between double quotation marks.",)),
        "title": (None, ("Begin with a title between << and >>.",)),
        "postscript": (None, ("Add a postscript that begins with P.S. on a line of its own.",)),
        "placeholder": (None, ("Leave a gap to fill in, in square brackets like [name].",)),
    }[kind]  # fmt: skip
    return Constraint(kind, argument, rng.choice(texts))


def draw_prompts(count: int, seed: int, avoid: Iterable[str] = ()) -> list[Record]:
    """Distinct prompts: {"prompt", "constraints": [{"kind", "argument", "text"}]}, one or two each.

    Args:
        avoid: prompts that none may equal, such as those of another split.

    Raises:
        InvalidParameterError: `count` below 1.
    """
    if count < 1:
        raise InvalidParameterError("count", count, "must be >= 1")
    rng = random.Random(seed)
    seen = {_normal(prompt) for prompt in avoid}
    records: list[Record] = []
    while len(records) < count:
        first, second = rng.sample(KINDS, 2)
        is_single = rng.random() < 0.5 or any({first, second} <= group for group in _GROUPS)
        kinds = [first] if is_single else [first, second]
        constraints = [draw_constraint(kind, rng) for kind in kinds]
        ask = rng.choice(_ASKS).format(topic=rng.choice(TOPICS))
        prompt = " ".join([ask, *(constraint.text for constraint in constraints)])
        if _normal(prompt) in seen:
            continue
        seen.add(_normal(prompt))
        fields = [{"kind": c.kind, "argument": c.argument, "text": c.text} for c in constraints]
        records.append({"prompt": prompt, "constraints": fields})
    return records


def reward(constraints: Sequence[dict[str, Any]], response: str) -> float:
    """REWARD_SCALE * (share of the constraints that hold - 1/2).

    A response of fewer than MIN_WORDS words says nothing about its topic: it fulfils none.
    """
    if len(words_of(response)) < MIN_WORDS:
        return -REWARD_SCALE / 2
    held = [Constraint(**fields).holds(response) for fields in constraints]
    return REWARD_SCALE * (sum(held) / len(held) - 0.5)


def check_disjoint(prompts: Iterable[str], others: Iterable[str]) -> None:
    """Raises where a prompt is one of `others`, whatever the case and the spaces.

    Raises:
        InvalidParameterError: names the first.
    """
    theirs = {_normal(prompt) for prompt in others}
    for prompt in prompts:
        if _normal(prompt) in theirs:
            raise InvalidParameterError("prompts", prompt, "must not be a prompt of the evaluation")


def _normal(text: str) -> str:
    return " ".join(words_of(text.lower()))
