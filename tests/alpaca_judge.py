# SPDX-License-Identifier: Apache-2.0
"""An annotator of alpaca_eval that needs no key: it always prefers the second output."""

from __future__ import annotations

from pathlib import Path

import yaml


def save_judge(folder: Path) -> Path:
    """Writes prompt and configuration to `folder`; the path of the latter."""
    prompt = folder / "judge.txt"
    prompt.write_text("{instruction} a: {output_1} b: {output_2}", "utf-8")
    config = {
        "own": {
            "prompt_template": str(prompt),
            "fn_completions": "test_completions",
            "completions_kwargs": {"model_name": "test", "value": "Output (b)"},
            "fn_completion_parser": "regex_parser",
            "completion_parser_kwargs": {
                "outputs_to_match": {1: r"Output \(a\)", 2: r"Output \(b\)"}
            },
            "is_randomize_output_order": False,
            "batch_size": 1,
        }
    }
    path = folder / "configs.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path
