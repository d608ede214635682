# SPDX-License-Identifier: Apache-2.0
"""What ivg_fast raises. Every error names the parameter and the value that it is about."""

from __future__ import annotations

from typing import Any


class IVGError(Exception):
    """Base of every error that ivg_fast raises by itself.

    Attributes:
        outputs: where Engine.generate raised it, what the other prompts returned, None for failed
            ones.
        failures: there too, what each failed prompt failed with, by its index.
    """

    outputs: list[Any] | None = None
    failures: dict[int, BaseException] | None = None


class InvalidParameterError(IVGError, ValueError):
    """A parameter has a value that it cannot have.

    Attributes:
        parameter: the name of the parameter, as the caller wrote it.
        value: what was given.
    """

    def __init__(self, parameter: str, value: Any, requirement: str) -> None:
        super().__init__(f"{parameter} {requirement}, got {value!r}")
        self.parameter = parameter
        self.value = value
        self._requirement = requirement

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parameter, self.value, self._requirement)


class VocabularyMismatchError(IVGError):
    """Two models that must share token ids do not: the same id means different pieces."""


class UnsupportedModelError(IVGError):
    """The model cannot be served, or cannot do what is asked of it."""


class CapacityError(IVGError):
    """A request that could never fit: not in the KV pool, not in the batch, not in the model's
    positions."""


class QueueFullError(IVGError):
    """More requests wait than `max_queued_requests` allows."""


class NonFiniteLogitsError(IVGError):
    """A model returned logits from which no token can be drawn (NaN, or no finite entry in a
    row)."""


class EngineStoppedError(IVGError):
    """An AsyncEngine that has been shut down, or whose thread has failed: `__cause__` is why."""


class ScorerError(IVGError):
    """A scorer raised, or did not return one finite number a candidate."""
