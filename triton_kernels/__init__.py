# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, installed as `ivg_fast.triton_kernels`. Each module imports triton only when it
is used."""
