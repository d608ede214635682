# SPDX-License-Identifier: Apache-2.0
"""`check_wheel.py SITE`: imports the wheel that was installed into SITE and uses its parts."""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import ivg_fast
from ivg_fast import _C
from ivg_fast.ops.guided_sample import guided_sample

site = Path(sys.argv[1])
modules = (ivg_fast, _C, importlib.import_module("ivg_fast.triton_kernels"))
for module in modules:
    path = Path(str(module.__file__))
    if not path.is_relative_to(site):
        raise SystemExit(f"{module.__name__} was imported from {path}, not from {site}")
drawn = guided_sample(torch.zeros(1, 8), seeds=[1], candidate_ids=[0], positions=[0])
if not 0 <= int(drawn.token_ids[0]) < 8:
    raise SystemExit(f"guided_sample drew {drawn}")
if _C.BlockPool(4).num_free != 4 or version("ivg_fast") != ivg_fast.__version__:
    raise SystemExit("the wheel's parts disagree")
print(f"wheel of ivg_fast {ivg_fast.__version__} works: {_C.cpu_isa()}, cuda {_C.cuda_built}")
