# SPDX-License-Identifier: Apache-2.0
"""Engines that live on the base models that they serve, from one call to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import EngineConfig

_ATTRIBUTE = "_ivg_fast_engines"
# Engines of one base model that are kept; the one unused for longest is closed for the next.
MAX_ENGINES = 4
_ROLES = ("base", "tuned", "untuned", "value")


class EngineShelf:
    """The engines of one base model, by what they were made of.

    It is an attribute of that model: model, engines and guides refer to each other, and go together
    when nobody else holds the model. A copy or a pickle of the model comes without engines.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._engines: dict[tuple[Any, ...], tuple[Engine, tuple[Any, ...]]] = {}

    def __deepcopy__(self, _memo: Any) -> EngineShelf:
        return EngineShelf()

    def __reduce__(self) -> tuple[Any, ...]:
        return EngineShelf, ()

    def __len__(self) -> int:
        return len(self._engines)

    def take(
        self,
        models: Mapping[str, Any],
        tokenizer: Any,
        tokenizers: Mapping[str, Any] | None,
        config: EngineConfig | None,
    ) -> Engine:
        """The engine of these, made where there is none. What it was made of stays alive with it,
        so that no id names another object meanwhile."""
        own = tuple((tokenizers or {}).get(role) for role in _ROLES)
        parts = (*(models[role] for role in _ROLES), tokenizer, *own)
        key = (*map(id, parts), config, *(_shape(models[role]) for role in _ROLES))
        found = self._engines.pop(key, None)
        if found is None:
            while len(self._engines) >= MAX_ENGINES:
                self._close(next(iter(self._engines)))
            engine = Engine(
                models["base"],
                tokenizer,
                tuned=models["tuned"],
                untuned=models["untuned"],
                value=models["value"],
                tokenizers=tokenizers,
                config=config,
            )
            found = engine, parts
        self._engines[key] = found  # the last one used is the last one in order
        return found[0]

    def close(self) -> None:
        """Closes every engine."""
        with self.lock:
            for key in list(self._engines):
                self._close(key)

    def _close(self, key: tuple[Any, ...]) -> None:
        self._engines.pop(key)[0].close(keep_value=True)  # a ValueFunction is the caller's


_SHELVES: weakref.WeakSet[EngineShelf] = weakref.WeakSet()


@contextmanager
def engine_of(
    base: nn.Module,
    *,
    tuned: nn.Module | None = None,
    untuned: nn.Module | None = None,
    value: Any = None,
    tokenizer: Any = None,
    tokenizers: Mapping[str, Any] | None = None,
    config: EngineConfig | None = None,
) -> Iterator[Engine]:
    """The engine of these models, kept on `base`; one thread at a time. At the end of the block the
    models are as they were before.

    Raises:
        InvalidParameterError: a model in training mode.
        Exception: what the constructor of an Engine raises.
    """
    models = {"base": base, "tuned": tuned, "untuned": untuned, "value": value}
    for role, model in models.items():
        if isinstance(model, nn.Module) and model.training:
            raise InvalidParameterError(
                f"{role}.training", True, "must be False: call eval() before"
            )
    shelf = shelf_of(base)
    if shelf is None:
        shelf = EngineShelf()
        setattr(base, _ATTRIBUTE, shelf)
        _SHELVES.add(shelf)
    with shelf.lock:
        engine = shelf.take(models, tokenizer, tokenizers, config)
        try:
            yield engine
        finally:
            engine.release_models()


def shelf_of(base: nn.Module) -> EngineShelf | None:
    """The engines that live on a model; None: there never was one."""
    return vars(base).get(_ATTRIBUTE)


def close_engines(base: nn.Module | None = None) -> None:
    """Closes the engines that live on `base`, or all of this process. The next call makes new
    ones."""
    shelves = list(_SHELVES) if base is None else [shelf_of(base)]
    for shelf in shelves:
        if shelf is not None:
            shelf.close()


def _shape(model: Any) -> tuple[Any, ...] | None:
    """What of a model an engine takes for granted, and its owner can change."""
    if not isinstance(model, nn.Module):
        return None
    return tuple((p.shape, p.dtype, p.device) for p in model.parameters())
