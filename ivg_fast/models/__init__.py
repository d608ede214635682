# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoders on the paged cache, value functions, safe loading, the vocabulary check."""
