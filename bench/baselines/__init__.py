# SPDX-License-Identifier: Apache-2.0
"""IVG in plain PyTorch and transformers: what ivg_fast is measured against."""

from bench.baselines.common import BaselineResult, ValueModel
from bench.baselines.reference_style import ReferenceStyleIVG
from bench.baselines.tuned_pytorch import TunedPyTorchIVG

__all__ = ["BaselineResult", "ReferenceStyleIVG", "TunedPyTorchIVG", "ValueModel"]
