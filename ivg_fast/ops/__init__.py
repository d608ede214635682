# SPDX-License-Identifier: Apache-2.0
"""The ops: one file each, a public function, its `*_ref` twin in plain PyTorch, and the choice of
backend."""
