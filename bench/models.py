# SPDX-License-Identifier: Apache-2.0
"""`python -m bench models`: IVG end to end on models of well-known shapes with random weights.

One prompt, W*K candidates; the engine, tuned_pytorch and reference_style on the same weights, one
after another (they would not all fit at once), and the least that a step can take: every weight
read once at the bandwidth at which this run copies a large tensor. The explicit value is a head on
the trunk of the tuned guide, so that three models run; with W*K = 1 there is nothing to select.

- time: of a whole response, prefill included;
- time per step: of the tokens behind the first chunk, selections and forks included;
- host waits: num_host_syncs of the engine.

On a GPU the last line of stdout holds, for W*K = 16 and 1, what torch's profiler saw of a step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.baselines import ReferenceStyleIVG
from bench.model_family import SEARCHES, ModelFamily, free_memory, request
from bench.model_shapes import FAMILIES, num_parameters, step_bytes
from bench.run import OURS, Run, first_line, parser_of
from bench.step_profile import per_step, profiled
from ivg_fast import Engine

TUNED, COMPILED, REFERENCE = "tuned_pytorch", "tuned_pytorch, compiled", "reference_style"
BOUND, BOUND_KV = "bound: weights", "bound: weights and KV"
# Those that the targets name first.
CANDIDATES = (16, 1, 4, 64)
PROFILED = (16, 1)
# What a provider may take longer at W*K than at the last one.
GROWTH = 1.5
COMPILE_SECONDS = 150.0

Generate = Callable[[int], Any]


class Places:
    """The runs of one family: every provider at every W*K, while there is time and memory."""

    def __init__(self, run: Run, family: ModelFamily, num_prompt: int, num_tokens: int) -> None:
        self.run, self.family = run, family
        self.prompt = family.prompt(num_prompt)
        self.num_tokens = num_tokens
        self.chunk_length = FAMILIES[family.name].chunk_length
        if num_tokens <= self.chunk_length:
            raise ValueError(f"num_tokens must exceed {self.chunk_length}, got {num_tokens}")
        self.profiles: dict[str, Any] = {}
        self.steps_ms: dict[str, dict[str, float]] = {}
        self._expected: dict[str, float] = {}
        roles = FAMILIES[family.name].roles
        models = ", ".join(f"{role} {shape}" for role, shape in roles.items())
        self._config = (
            f"{models}; {str(family.dtype)[6:]}, prompt {num_prompt}, {num_tokens} tokens, "
            f"L = {self.chunk_length}"
        )

    @property
    def kernel(self) -> str:
        return f"IVG, {self.family.name}"

    def config(self, num_candidates: int) -> str:
        width, children = SEARCHES[num_candidates]
        return f"{self._config}, W, K = {width}, {children}"

    def measure(
        self, name: str, num_candidates: int, make: Callable[[], Generate], num_rounds: int
    ) -> None:
        """One provider at one W*K; what it lacks time or memory for is left out, and said."""
        what = f"{self.kernel} WK={num_candidates}: {name}"
        if not self.run.has_time(what, self._expected.get(name, 0.0) * GROWTH):
            return
        begin = time.monotonic()
        try:
            self._measure(name, num_candidates, make(), num_rounds)
        except torch.OutOfMemoryError as error:
            self.run.leave_out(what, first_line(error))
        except Exception as error:  # one provider's failure is not the others'
            self.run.fail(what, first_line(error))
        free_memory(self.run.device)
        self._expected[name] = time.monotonic() - begin

    def _measure(self, name: str, num_candidates: int, generate: Generate, num_rounds: int) -> None:
        short, long = self.chunk_length, self.num_tokens
        # Every shape that the long run meets: a whole chunk and the beginning of the next, and a
        # last one that may be shorter.
        for _ in range(2 if name != REFERENCE else 1):
            generate(short + 1 if name == REFERENCE else long)
        seconds = {
            tokens: np.array([self._seconds(generate, tokens) for _ in range(num_rounds)])
            for tokens in (short, long)
        }
        x, config = {"WK": num_candidates}, self.config(num_candidates)
        add = self.run.add
        add(self.kernel, name, "time", "s", x, seconds[long], config)
        step = (seconds[long] - np.median(seconds[short])) / (long - short) * 1e3
        add(self.kernel, name, "time per step", "ms", x, step, config)
        add(self.kernel, name, "tokens", "1/s", x, long / seconds[long], config)
        self.steps_ms.setdefault(f"WK={num_candidates}", {})[name] = float(np.median(step))
        if num_candidates in PROFILED and name != REFERENCE and self.run.device == "cuda":
            # The first run under a profiler pays for its set-up.
            _, longer, shorter = (
                profiled(lambda n=n: generate(n), "cuda") for n in (short, long, short)
            )
            self.profiles[f"WK={num_candidates}, {name}"] = per_step(longer, shorter, long - short)

    def _seconds(self, generate: Generate, num_tokens: int) -> float:
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        generate(num_tokens)
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def with_engine(self, engine: Engine, num_candidates: int) -> Generate:
        def generate(num_tokens: int) -> Any:
            params = request(self.family.name, num_candidates, num_tokens)
            (output,) = engine.generate([self.prompt], params, seeds=[1])
            return output

        return generate

    def with_baseline(self, baseline: Any, num_candidates: int) -> Generate:
        def generate(num_tokens: int) -> Any:
            params = request(self.family.name, num_candidates, num_tokens)
            (result,) = baseline.generate([self.prompt], params, seed=1)
            return result

        return generate

    def counters(self, engine: Engine, num_candidates: int) -> None:
        """The engine's exact counters of one response."""
        stats = self.with_engine(engine, num_candidates)(self.num_tokens).stats
        x, config = {"WK": num_candidates}, self.config(num_candidates)
        for counter in ("num_host_syncs", "num_selections", "num_blocks_copied", "peak_blocks"):
            value = getattr(stats, counter)
            self.run.add(self.kernel, OURS, counter, "1", x, [value], config)
        self.steps_ms[f"WK={num_candidates}"]["host waits of a response"] = stats.num_host_syncs

    def bounds(self, num_candidates: int) -> None:
        """What a step takes at the least."""
        width, children = SEARCHES[num_candidates]
        weights, kv = step_bytes(
            FAMILIES[self.family.name],
            prompt=len(self.prompt),
            response=self.num_tokens,
            beam_width=width,
            num_candidates=children,
            dtype=self.family.dtype,
        )
        x, config = {"WK": num_candidates}, self.config(num_candidates)
        bandwidth = self.run.limits["copy"] * 1e9
        for name, num_bytes in ((BOUND, weights), (BOUND_KV, weights + kv)):
            ms = num_bytes / bandwidth * 1e3
            self.run.add(self.kernel, name, "bytes", "B", x, [num_bytes], config)
            self.run.add(self.kernel, name, "time per step", "ms", x, [ms], config)
            self.steps_ms.setdefault(f"WK={num_candidates}", {})[name] = ms


def compare(places: Places, candidates: Sequence[int], *, can_compile: bool) -> None:
    """Every provider at every W*K."""
    family, run = places.family, places.run
    engine: Engine | None = None
    try:
        engine = family.engine(max(candidates), len(places.prompt), places.num_tokens)
    except Exception as error:
        run.fail(f"{places.kernel}: {OURS}", first_line(error))
    baselines: dict[str, Any] = {
        TUNED: family.baseline("tuned_pytorch"),
        REFERENCE: family.baseline("reference_style"),
    }
    for wk in candidates:
        places.bounds(wk)
        if engine is not None:
            places.measure(OURS, wk, lambda wk=wk: places.with_engine(engine, wk), 3)
            if OURS in places.steps_ms[f"WK={wk}"]:
                places.counters(engine, wk)
        for name, baseline in baselines.items():
            places.measure(
                name,
                wk,
                lambda baseline=baseline, wk=wk: places.with_baseline(baseline, wk),
                1 if isinstance(baseline, ReferenceStyleIVG) else 3,
            )
            if name == TUNED:
                baseline.drop_caches()
    if engine is not None:
        engine.close()
    if not can_compile:
        return
    compiled = family.baseline("tuned_pytorch", compile=True)
    for wk in PROFILED:
        places._expected[COMPILED] = COMPILE_SECONDS
        torch._dynamo.reset()
        places.measure(COMPILED, wk, lambda wk=wk: places.with_baseline(compiled, wk), 3)
        compiled.drop_caches()


def ratios(steps_ms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By W*K: a step of each provider over one of ours, and ours over the bound."""
    found: dict[str, dict[str, float]] = {}
    for place, steps in steps_ms.items():
        own = steps.get(OURS)
        if own is None:
            continue
        names = (REFERENCE, TUNED, COMPILED)
        found[place] = {f"{n} / {OURS}": round(steps[n] / own, 3) for n in names if n in steps}
        found[place] |= {f"{OURS} / {n}": round(own / steps[n], 3) for n in (BOUND, BOUND_KV)}
        found[place]["tokens/s a sequence"] = round(1e3 / own, 1)
    return found


def main() -> None:
    argv = sys.argv[1:]
    parser = parser_of(__doc__, has_cuda=True)
    parser.add_argument("--family", choices=FAMILIES, default="tiny-llama")
    parser.add_argument("--candidates", type=int, nargs="+", choices=SEARCHES, default=None)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="of a response")
    parser.add_argument(
        "--compile", action="store_true", help="tuned_pytorch through torch.compile as well"
    )
    options = parser.parse_args()
    run = Run("models", options, argv)
    run.measure_limits()
    candidates = options.candidates or (PROFILED if options.quick else CANDIDATES)
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    family = ModelFamily(options.family, run.device, dtype)
    places = Places(run, family, options.prompt, options.tokens)
    compare(places, candidates, can_compile=options.compile)
    shapes = FAMILIES[options.family].roles
    run.finish(
        family=options.family,
        parameters={role: num_parameters(shape) for role, shape in shapes.items()},
        steps_ms=places.steps_ms,
        step_ratios=ratios(places.steps_ms),
        profiles=places.profiles,
    )
    if run.failed:
        raise SystemExit(1)
