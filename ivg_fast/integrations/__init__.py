# SPDX-License-Identifier: Apache-2.0
"""The tools that people use already. Each module needs its own tool alone; importing this package
needs none of them."""
