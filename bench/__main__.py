# SPDX-License-Identifier: Apache-2.0
"""`python -m bench NAME ...` runs bench/NAME.py."""

import importlib
import pkgutil
import sys

import bench


def main() -> None:
    names = sorted(
        module.name for module in pkgutil.iter_modules(bench.__path__) if module.name != "__main__"
    )
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"usage: python -m bench {{{','.join(names)}}} [options]")
    name = sys.argv.pop(1)
    sys.argv[0] = f"bench {name}"
    importlib.import_module(f"bench.{name}").main()


main()
