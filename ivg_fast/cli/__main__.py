# SPDX-License-Identifier: Apache-2.0
"""`python -m ivg_fast.cli`, the same as `ivg-fast`."""

import sys

from ivg_fast.cli import main

sys.exit(main())
