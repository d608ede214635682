# SPDX-License-Identifier: Apache-2.0
"""The sampling kernels compile for every architecture that is supported, and spill nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = ["80", "90", "100", "120"]


def test_kernels_compile_without_spills(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("aot_compile.py")
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), *ARCHITECTURES]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local_bytes = json.loads(done.stdout.splitlines()[-1])
    assert set(local_bytes) == set(ARCHITECTURES)
    for architecture, kernels in local_bytes.items():
        assert len(kernels) >= 8, architecture
        assert not any(kernels.values()), (architecture, kernels)
