# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for every architecture that is supported, spill nothing and fit in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that a program may have, by architecture.
SHARED_MEMORY = {"80": 166_912, "90": 232_448, "100": 232_448, "120": 101_376}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_kernels_compile_without_spills(tmp_path, architecture):
    pytest.importorskip("triton", reason="Triton is for Linux")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("aot_compile.py")
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), architecture]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout.splitlines()[-1])
    assert set(usage) == {architecture}
    kernels = usage[architecture]
    assert len(kernels) >= 14
    assert not any(local for local, _ in kernels.values()), kernels
    assert all(shared <= SHARED_MEMORY[architecture] for _, shared in kernels.values()), kernels
