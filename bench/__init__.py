# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: baselines in plain PyTorch, microbenchmarks, experiments."""
