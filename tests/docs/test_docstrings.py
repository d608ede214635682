# SPDX-License-Identifier: Apache-2.0
"""Every public name has a docstring, and so has what it offers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import ivg_fast
import ivg_fast.ops

OPS = [name for _, name, _ in pkgutil.iter_modules(ivg_fast.ops.__path__) if name[0] != "_"]


def without_docstring(name: str, thing: Any) -> Iterator[str]:
    """`name` and its public members that say nothing of themselves."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
        return
    # A dataclass without one gets its signature for a docstring.
    if not thing.__doc__ or (dataclasses.is_dataclass(thing) and "\n" not in thing.__doc__):
        yield name
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            is_public = member[0] != "_" and not dataclasses.is_dataclass(value)
            if isinstance(value, classmethod | staticmethod):
                value = value.__func__
            is_routine = inspect.isfunction(value) or isinstance(value, property)
            if is_public and is_routine and not value.__doc__:
                yield f"{name}.{member}"


@pytest.mark.parametrize("name", ivg_fast.__all__)
def test_names_of_the_package(name: str) -> None:
    assert list(without_docstring(name, getattr(ivg_fast, name))) == []


@pytest.mark.parametrize("name", OPS)
def test_names_of_the_ops(name: str) -> None:
    module = importlib.import_module(f"ivg_fast.ops.{name}")
    assert module.__doc__
    own = {
        key: value
        for key, value in vars(module).items()
        if key[0] != "_" and getattr(value, "__module__", None) == module.__name__
    }
    assert own, "an op without a public name"
    found = [miss for key, value in own.items() for miss in without_docstring(key, value)]
    assert found == []


def test_a_missing_docstring_is_seen() -> None:
    class Bare:
        """Itself only."""

        def run(self) -> None: ...

        @property
        def size(self) -> int: ...

    def silent() -> None: ...

    assert list(without_docstring("Bare", Bare)) == ["Bare.run", "Bare.size"]
    assert list(without_docstring("silent", silent)) == ["silent"]


@pytest.mark.parametrize("name", [n for n in ivg_fast.__all__ if n != "TEMPLATES"])
def test_every_field_is_explained(name: str) -> None:
    thing = getattr(ivg_fast, name)
    if dataclasses.is_dataclass(thing):
        text = inspect.getdoc(thing) or ""
        assert [f.name for f in dataclasses.fields(thing) if f.name not in text] == []
