# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile wherever nvcc is found, for every architecture, and are not missed
where it is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ivg_fast import _C
from ivg_fast.ops.block_copy import gpu_backend

REPO = Path(__file__).parents[1]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")


def cmake(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("cmake", path=TOOLS) or "cmake", *map(str, arguments)]
    environment = {**os.environ, "PATH": TOOLS, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def configure(folder: Path, option: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = [f"-DIVG_FAST_CUDA={option}", f"-DPython_EXECUTABLE={sys.executable}"]
    return cmake("-S", REPO, "-B", folder, "-G", "Ninja", *options, **environment)


def cuobjdump(file: Path, *options: str) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="neither CUDA's nor Triton's cuobjdump")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    command = [tool, *options, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architectures(file: Path) -> tuple[set[str], set[str]]:
    """Those with machine code, those with PTX."""
    listing = cuobjdump(file, "--list-elf"), cuobjdump(file, "--list-ptx")
    elf, ptx = (set(re.findall(r"\bsm_(\d+)\.(?:cubin|ptx)", text)) for text in listing)
    return elf, ptx


@pytest.mark.skipif(NVCC is None, reason="no nvcc; test_without_nvcc checks what happens then")
def test_every_architecture_is_compiled_without_spills(tmp_path):
    configured = configure(tmp_path, "ON")
    assert configured.returncode == 0, configured.stderr
    built = cmake("--build", tmp_path, "--target", "ivg_cuda")
    assert built.returncode == 0, built.stdout + built.stderr
    library = tmp_path / "libivg_cuda.a"
    elf, ptx = architectures(library)
    expected = {"80"}
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout
    release = tuple(map(int, re.findall(r"release (\d+)\.(\d+)", version)[0]))
    if release >= (11, 8):
        expected.add("90")
    if release >= (12, 8):
        expected |= {"100", "120"}
    assert elf == expected
    assert ptx == expected - {"90", "100"}
    usage = re.findall(r"(?:STACK|LOCAL):(\d+)", cuobjdump(library, "--dump-resource-usage"))
    assert len(usage) >= 2 * len(expected)
    assert set(usage) == {"0"}


def test_without_nvcc(tmp_path):
    missing = {"CUDACXX": str(tmp_path / "nvcc")}
    automatic = configure(tmp_path / "auto", "AUTO", **missing)
    assert automatic.returncode == 0, automatic.stderr
    told = [line for line in automatic.stdout.splitlines() if "ivg_fast:" in line]
    assert len(told) == 1
    assert "built without CUDA kernels: no nvcc was found" in told[0]
    required = configure(tmp_path / "on", "ON", **missing)
    assert required.returncode != 0
    assert "IVG_FAST_CUDA=1, but no nvcc was found" in required.stderr
    never = configure(tmp_path / "off", "OFF")
    assert never.returncode == 0, never.stderr
    assert "CUDA" not in never.stdout


def test_this_build_says_what_it_has():
    assert _C.cuda_built == hasattr(_C, "cuda_copy_blocks") == bool(_C.cuda_architectures)
    if _C.cuda_built:
        assert gpu_backend() == "cuda"
        elf, _ = architectures(Path(_C.__file__))
        assert elf == set(_C.cuda_architectures.split())
    else:
        assert gpu_backend() == "triton"
