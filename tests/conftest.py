# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests; its place also puts this folder on the import path."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels run on the GPU where there is one, else in Triton's interpreter on the CPU. Triton
# reads this when it is imported, which other libraries may do at any time.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models run fastest on one thread: two would spend their time at barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hangs waits for this event; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()
