# SPDX-License-Identifier: Apache-2.0
# The extension seen by type checkers. Addresses are integers; ivg_fast.ops is the typed surface.
from typing import Any

def __getattr__(name: str) -> Any: ...
