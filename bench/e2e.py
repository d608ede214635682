# SPDX-License-Identifier: Apache-2.0
"""`python -m bench e2e`: guided search end to end on the bundled IMDB family, in four parts.

- search: IVG by the engine, by both baselines, and the engine's own bound: the packed forwards of
  the same run with free attention and sampling (bench/replay.py);
- prompt: time per emitted token, prefill included, from short to long prompts;
- candidates: each method against W*K, with W = K;
- ablation: base, EFT, CBS (implicit, explicit) and IVG as the response grows: seconds, KV bytes,
  forwarded tokens and calls of a model. That of arXiv 2409.17819, by the engine.

Counters are exact: SearchStats of the engine, and what the models of a baseline were called with.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.harness import as_x
from bench.imdb import Imdb, counted_tokens, engine_tokens
from bench.replay import Replay
from bench.run import OURS, Run, at_least_one, parser_of
from ivg_fast import SearchParams

BOUND = "bound: forwards alone"
SAMPLING: dict[str, Any] = {"temperature": 0.7, "ignore_eos": True}
WEIGHT = 0.5
PARTS = ("search", "prompt", "candidates", "ablation")


def ivg(max_tokens: int) -> SearchParams:
    """The paper's controlled sentiment: W, K, L = 4, 4, 5."""
    return SearchParams.ivg(max_tokens=max_tokens, guidance_weight=WEIGHT, **SAMPLING)


def methods(max_tokens: int, width: int = 4) -> dict[str, SearchParams]:
    """Every method at W = K = `width` where it searches."""
    search = {"beam_width": width, "num_candidates": width, "chunk_length": 5}
    common = {"max_tokens": max_tokens, **SAMPLING}
    return {
        "base": SearchParams.base(**common),
        "EFT": SearchParams.eft(guidance_weight=WEIGHT, **common),
        "CBS, implicit": SearchParams.cbs(scorer="implicit", **search, **common),
        "CBS, explicit": SearchParams.cbs(scorer="explicit", **search, **common),
        "IVG": SearchParams.ivg(guidance_weight=WEIGHT, **search, **common),
    }


def describe(num_tokens: int, search: str = "W, K, L = 4, 4, 5") -> str:
    return f"IMDB family, float32, {search}, {num_tokens} tokens, T 0.7, weight {WEIGHT}"


def search(run: Run, family: Imdb, num_tokens: int, at_once: tuple[int, ...]) -> None:
    """So many prompts at once."""
    params, config = ivg(num_tokens), describe(num_tokens)
    baselines = {"reference_style": family.reference, "tuned_pytorch": family.tuned}
    for num_prompts in at_once:
        prompts, x = family.prompts(num_prompts), {"prompts": num_prompts}
        if not run.has_time(f"IVG {as_x(x)}"):
            continue
        bound = Replay(family.engine)
        with bound.recording():
            outputs = family.generate(prompts, params)
        providers = {
            OURS: lambda prompts=prompts: family.generate(prompts, params),
            **{
                name: lambda baseline=baseline, prompts=prompts: baseline.generate(prompts, params)
                for name, baseline in baselines.items()
            },
            BOUND: bound,
        }
        run.compare("IVG", x, providers, config, unit="s", num_warm_ups=1)
        tokens = {OURS: engine_tokens(outputs)}
        for name, baseline in baselines.items():
            with counted_tokens(baseline) as counts:
                baseline.generate(prompts, params)
            tokens[name] = counts
        for name, by_role in tokens.items():
            for role, count in sorted(by_role.items()):
                run.add("IVG", name, f"forwarded tokens, {role}", "tokens", x, [count], config)
        for counter in ("num_selections", "num_blocks_copied", "peak_blocks"):
            total = sum(getattr(output.stats, counter) for output in outputs)
            run.add("IVG", OURS, counter, "1", x, [total], config)


def prompt(run: Run, family: Imdb, num_tokens: int, lengths: tuple[int, ...]) -> None:
    """From the shortest to the longest prompt; the bound and one token say what a prefill costs."""
    params, config = ivg(num_tokens), describe(num_tokens)
    for length in lengths:
        prompts, x = family.prompts(1, length), {"P": length}
        if not run.has_time(f"IVG, prompt {as_x(x)}"):
            continue
        bound = Replay(family.engine)
        with bound.recording():
            family.generate(prompts, params)
        providers = {
            OURS: lambda prompts=prompts: family.generate(prompts, params),
            "tuned_pytorch": lambda prompts=prompts: family.tuned.generate(prompts, params),
            BOUND: bound,
            "ivg_fast, first token": lambda prompts=prompts: family.generate(prompts, ivg(1)),
        }
        if length in (lengths[0], lengths[-1]) and not run.options.quick:
            providers["reference_style"] = lambda prompts=prompts: family.reference.generate(
                prompts, params
            )
        times = run.compare("IVG, prompt", x, providers, config, unit="s", num_warm_ups=1)
        for name, seconds in times.items():
            if "first" not in name:
                each = seconds / num_tokens * 1e3
                run.add("IVG, prompt", name, "time per token", "ms", x, each, config)


def _compare_methods(
    run: Run, family: Imdb, kernel: str, x: dict[str, int], chosen: dict[str, Any], config: str
) -> None:
    if not run.has_time(f"{kernel} {as_x(x)}"):
        return
    prompts = family.prompts(1)
    providers = {
        name: lambda params=params: family.generate(prompts, params)
        for name, params in chosen.items()
    }
    run.compare(kernel, x, providers, config, unit="s", num_warm_ups=1)
    for name, params in chosen.items():
        calls = Replay(family.engine)
        with calls.recording():
            (output,) = family.generate(prompts, params)
        tokens = engine_tokens([output])
        counts = {
            ("KV", "B"): family.kv_bytes(output),
            ("forwarded tokens", "tokens"): tokens.total(),
            ("forwarded tokens, base", "tokens"): tokens["base"],
            ("model calls", "calls"): calls.num_forwards.total(),
            ("model calls, base", "calls"): calls.num_forwards["base"],
        }
        for (metric, unit), value in counts.items():
            run.add(kernel, name, metric, unit, x, [value], config)


def candidates(run: Run, family: Imdb, num_tokens: int, widths: tuple[int, ...]) -> None:
    config = describe(num_tokens, "W = K, L = 5")
    for width in widths:
        x = {"WK": width * width}
        chosen = methods(num_tokens, width)
        _compare_methods(run, family, "methods, candidates", x, chosen, config)


def ablation(run: Run, family: Imdb, lengths: tuple[int, ...]) -> None:
    config = describe(0).replace("0 tokens", "T tokens")
    for length in lengths:
        chosen = methods(length)
        _compare_methods(run, family, "methods, response", {"T": length}, chosen, config)


def summary_of(run: Run) -> dict[str, Any]:
    """The figures that the targets name."""
    times = {(r.kernel, r.x, r.provider): r.y_50 for r in run.records if r.metric == "time"}
    found: dict[str, Any] = {}
    for kernel, x, name in times:
        if (kernel, name) == ("IVG", BOUND):
            ratio = times[kernel, x, OURS] / times[kernel, x, BOUND]
            found[f"{x}: {OURS} / bound"] = round(ratio, 3)
    each = [r for r in run.records if (r.metric, r.provider) == ("time per token", OURS)]
    if len(each) > 1:
        found[f"per token, {each[-1].x} / {each[0].x}"] = round(each[-1].y_50 / each[0].y_50, 3)
    return found


def main() -> None:
    argv = sys.argv[1:]
    parser = parser_of(__doc__, has_cold=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--tokens", type=at_least_one, help="emitted a prompt, but for the ablation"
    )
    options = parser.parse_args()
    run = Run("e2e", options, argv, num_rounds=(5, 3))
    is_quick = options.quick
    num_tokens = options.tokens or (10 if is_quick else 50)
    family = Imdb(run.device)
    if "search" in options.parts:
        search(run, family, num_tokens, (1, 8))
    if "prompt" in options.parts:
        prompt(run, family, num_tokens, (20, 400) if is_quick else (20, 50, 100, 200, 400))
    if "candidates" in options.parts:
        candidates(run, family, num_tokens, (1, 4) if is_quick else (1, 2, 4, 6, 8))
    if "ablation" in options.parts:
        ablation(run, family, (10, 30) if is_quick else (10, 25, 50, 75, 100))
    run.finish(**summary_of(run))


if __name__ == "__main__":
    main()
