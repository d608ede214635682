# SPDX-License-Identifier: Apache-2.0
"""Tiny models run fastest on one thread."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
