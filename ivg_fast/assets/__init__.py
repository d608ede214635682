# SPDX-License-Identifier: Apache-2.0
"""Files shipped with the package."""

from __future__ import annotations

from pathlib import Path


def imdb_path() -> Path:
    """Folder of the IMDB family: `base`, `untuned`, `tuned`, `value`, gold reward and prompts."""
    return Path(__file__).resolve().parent / "imdb"
