# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the server. Nothing here needs its extra before a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from ivg_fast import Engine

if TYPE_CHECKING:
    from serving import Steps


@pytest.fixture
def braked() -> Iterator[Callable[[Engine], Steps]]:
    """Makes Steps, whose brakes are off at the end."""
    from serving import Steps

    made: list[Steps] = []

    def make(engine: Engine) -> Steps:
        made.append(Steps(engine))
        return made[-1]

    yield make
    for steps in made:
        steps.is_open.set()
        steps.seconds = 0.0
