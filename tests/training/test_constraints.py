# SPDX-License-Identifier: Apache-2.0
"""Prompts whose fulfilment a program can check."""

from __future__ import annotations

import random

import pytest

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import constraints
from ivg_fast.training.constraints import Constraint, draw_constraint, draw_prompts, reward

# (kind, argument, a response that does it, one that does not)
CASES = [
    ("lower_case", None, "all of it is small.", "All of it is small."),
    ("upper_case", None, "LOUD, 2 TIMES!", "LOUD, 2 Times!"),
    ("no_comma", None, "One and two.", "One, two."),
    ("min_sentences", 2, "Yes. It is!", "Yes it is. "),
    ("min_sentences", 2, "It is 3.5 m. High.", "It is 3.5 m high"),
    ("max_words", 3, "just three words", "now it's four words"),
    ("min_words", 4, "now it's four words", "just three words"),
    ("keywords", ["blue", "time"], "Time is blue.", "Timely blues, blue."),
    ("forbidden", ["blue", "the"], "Then bluebells.", "Sea and The sky"),
    ("ending", "That is all.", "Bye. that is all.\n", "That is all. Bye"),
    ("bullets", 2, "Here:\n* a\n- b", "* a\n* b\n* c"),
    ("bullets", 1, "* a\n**bold** text", "**bold** text"),
    ("quotation", None, ' "Hello,\nyou" ', '"Hello" you'),
    ("quotation", None, '""', '"'),
    ("title", None, "<<On Tea>>\nGood.", "<On Tea>"),
    ("postscript", None, "Hi.\nP.S. Bye", "Hi. P.S. Bye"),
    ("placeholder", None, "Dear [name]", "Dear []"),
]


@pytest.mark.parametrize(("kind", "argument", "good", "bad"), CASES)
def test_checks(kind, argument, good, bad) -> None:
    constraint = Constraint(kind, argument, "")
    assert constraint.holds(good)
    assert not constraint.holds(bad)
    assert not constraint.holds(" \n")


def test_every_kind_is_tried_and_drawn() -> None:
    assert {kind for kind, *_ in CASES} == set(constraints.KINDS)
    rng = random.Random(0)
    for kind in constraints.KINDS:
        for _ in range(20):
            drawn = draw_constraint(kind, rng)
            assert drawn.kind == kind
            assert drawn.text


def test_prompts_are_distinct_and_a_function_of_the_seed() -> None:
    records = draw_prompts(200, 3)
    prompts = [record["prompt"] for record in records]
    assert len(set(prompts)) == 200
    assert draw_prompts(200, 3) == records
    assert draw_prompts(20, 4) != records[:20]
    for record in records:
        assert len(record["constraints"]) in (1, 2)
        assert all(fields["text"] in record["prompt"] for fields in record["constraints"])
        kinds = {fields["kind"] for fields in record["constraints"]}
        assert not kinds >= {"lower_case", "upper_case"}


def test_prompts_to_avoid() -> None:
    first = [record["prompt"] for record in draw_prompts(30, 5)]
    others = [record["prompt"] for record in draw_prompts(30, 5, avoid=[p.upper() for p in first])]
    assert not set(first) & set(others)
    constraints.check_disjoint(first, others)
    with pytest.raises(InvalidParameterError, match="must not be a prompt of the evaluation"):
        constraints.check_disjoint(others, [*first, f"  {others[7].lower()}"])


def test_reward_is_the_centred_share() -> None:
    fields = [
        {"kind": "no_comma", "argument": None, "text": ""},
        {"kind": "lower_case", "argument": None, "text": ""},
    ]
    assert reward(fields, "four words, all small") == 0
    assert reward(fields, "four words all small") == 3
    assert reward(fields, "Four words, not small") == -3
    assert reward(fields, "too short") == -3  # it fulfils both, and says nothing


def test_count_is_checked() -> None:
    with pytest.raises(InvalidParameterError, match="count"):
        draw_prompts(0, 1)
