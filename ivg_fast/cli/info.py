# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast info`: what was built, versions, devices."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

from ivg_fast import _C
from ivg_fast.ops.block_copy import gpu_backend


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("info", help="what was built, versions, devices")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> bool:
    """Prints a line for each; always succeeds."""
    built = ", sm_".join(_C.cuda_architectures.split())
    rows = {
        "ivg_fast": _version("ivg_fast"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton")},
        "CPU kernels": f"{_C.cpu_isa()}, {torch.get_num_threads()} threads",
        "CUDA kernels": f"built for sm_{built}, PTX" if built else "not built",
        "GPU": f"sampling and attention by triton, copies of blocks by {gpu_backend()}",
        "devices": ", ".join(
            ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
        ),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return True


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
