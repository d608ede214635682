# SPDX-License-Identifier: Apache-2.0
"""Experiments: do the methods do what the papers say, on models that ship or can be had?"""
