# SPDX-License-Identifier: Apache-2.0
"""`python -m bench NAME ...`; `python -m bench NAME --help` says more."""

import importlib
import sys

NAMES = {
    "ops": "the sampling ops against plain PyTorch",
    "scheduler": "what the C++ scheduler takes between two chunks",
    "kv": "writing and copying KV against plain PyTorch and a copy",
    "attention": "paged attention against torch's SDPA",
    "e2e": "guided search end to end against plain PyTorch and the engine's own bound",
    "serve": "the HTTP server under load from another process",
    "all": "all of these, one after another",
    "models": "guided search on models of well-known shapes, random weights, for a GPU",
    "report": "the READMEs' tables, and plots, from bench/results",
    "soak": "many short requests that abort, fail and leave: ends, blocks, memory",
    "demo": "base, EFT, CBS and IVG on held-out prompts",
}
MODULES = {"all": "suite"}


def main() -> None:
    lines = [f"  {name:<10} {what}" for name, what in NAMES.items()]
    usage = "\n".join(["usage: python -m bench NAME [options]", *lines])
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        raise SystemExit(usage)
    name = sys.argv.pop(1)
    sys.argv[0] = f"bench {name}"
    importlib.import_module(f"bench.{MODULES.get(name, name)}").main()


main()
