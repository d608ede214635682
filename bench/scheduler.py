# SPDX-License-Identifier: Apache-2.0
"""`python -m bench scheduler`: what the C++ scheduler takes between two chunks.

Requests whose rows add up to 256, prompts of 1,024 tokens, responses of 256. Timed a round: plan
(with the fork), commit_tokens, plan_scores and commit_scores (the selection, a call a request),
through the Python binding, which the figures include.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from bench.harness import as_x
from bench.run import Run, parser_of
from ivg_fast import _C

# requests, W, K, L
SHAPES = ((1, 16, 16, 16), (4, 8, 8, 16), (16, 4, 4, 5), (64, 2, 2, 30))
PHASES = ("plan", "commit_tokens", "plan_scores", "commit_scores")
WHOLE = "plan + select + fork"
CONFIG = "256 rows, prompt 1024, response 256"


def _one_search(shape: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Microseconds [chunks, phases] of one run; the first chunk, a prefill, is left out."""
    requests, width, children, length = shape
    scheduler = _C.Scheduler(num_blocks=60_000, num_roles=4, max_num_rows=256, max_burst_steps=64)
    for _ in range(requests):
        scheduler.add_request(
            prompt_lens=[1024] * 4,
            step_roles=0b0111,
            settle_roles=0b1000,
            beam_width=width,
            num_candidates=children,
            chunk_length=length,
            max_tokens=256,
            has_scorer=True,
        )
    rounds = []
    while scheduler.has_unfinished:
        t0 = time.perf_counter()
        plan = scheduler.plan()
        t1 = time.perf_counter()
        shape_ = (plan.num_steps, len(plan.sample_request))
        tokens, floats = rng.integers(50_000, size=shape_, dtype=np.int32), np.zeros(shape_, "f4")
        ends = np.zeros(shape_[1], np.uint8), np.full(shape_[1], -1, np.int32)
        counts = plan.sample_steps.copy()
        t2 = time.perf_counter()
        scheduler.commit_tokens(tokens, floats, floats, floats, counts, *ends)
        t3 = time.perf_counter()
        scores = scheduler.plan_scores()
        t4 = time.perf_counter()
        ids, drawn = scores.request_ids.tolist(), rng.standard_normal((requests, width * children))
        selecting = 0.0
        for request, values in zip(ids, drawn, strict=True):
            begin = time.perf_counter()
            scheduler.commit_scores(request, values)
            selecting += time.perf_counter() - begin
        rounds.append([t1 - t0, t3 - t2, t4 - t3, selecting])
    return np.array(rounds)[1:] * 1e6


def main() -> None:
    argv = sys.argv[1:]
    options = parser_of(__doc__, has_cold=False).parse_args()
    run = Run("scheduler", options, argv, num_rounds=(20, 2))
    rng = np.random.default_rng(0)
    summary = {}
    for shape in SHAPES:
        x = dict(zip(("requests", "W", "K", "L"), shape, strict=True))
        if not run.has_time(as_x(x)):
            continue
        times = np.concatenate([_one_search(shape, rng) for _ in range(run.num_rounds)])
        plan, _, _, select = times.T
        columns = dict(zip(PHASES, times.T, strict=True)) | {WHOLE: plan + select}
        for phase, values in columns.items():
            run.add("scheduler", phase, "time", "us", x, values, CONFIG)
        summary[run.records[-1].x] = run.records[-1].y_50
    run.finish(**{f"{WHOLE}, us": summary})
