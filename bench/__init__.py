# SPDX-License-Identifier: Apache-2.0
"""Measurements: the demo, baselines in plain PyTorch, microbenchmarks, experiments."""
