# SPDX-License-Identifier: Apache-2.0
"""A thin bridge from setuptools to CMakeLists.txt, which is the one build definition.

`IVG_FAST_CUDA` chooses the CUDA kernels: unset builds them if nvcc is found, 1 requires them, 0
leaves them out. Nothing here imports torch: the extension has no torch headers, so it never needs
torch to build.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_option() -> str:
    """The value of the CMake option IVG_FAST_CUDA: AUTO, ON or OFF."""
    value = os.environ.get("IVG_FAST_CUDA", "")
    options = {"": "AUTO", "1": "ON", "0": "OFF"}
    if value not in options:
        raise SystemExit(f"IVG_FAST_CUDA must be unset, 0 or 1, got {value!r}")
    return options[value]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        cmake = shutil.which("cmake") or "cmake"
        # An isolated build has its own ninja and pybind11, gone afterwards: a cache that names
        # those of the build before would fail.
        configure = [
            *(cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIVG_FAST_CUDA={cuda_option()}",
            f"-DIVG_FAST_OUTPUT_DIR={target.parent}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C"], check=True)


setup(ext_modules=[Extension("ivg_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
