# SPDX-License-Identifier: Apache-2.0
"""A big batch on Ray: two workers with an engine each; whatever is killed, the job goes on.

python examples/ray_batch.py OUT BASE [TUNED UNTUNED [VALUE]] < prompts.txt

A worker that dies is started again and its rows with it. A job that was stopped as a whole is run
again with the same OUT: rows that are written there are not computed a second time.
"""

import json
import os
import sys
from pathlib import Path

import ray

from ivg_fast import EngineConfig, SearchParams
from ivg_fast.integrations.ray_data import EngineActor, rows_of


class Worker(EngineActor):
    """Also says which process it is, for those who want to see one die."""

    def __call__(self, batch):
        return {**super().__call__(batch), "pid": [os.getpid()] * len(batch["prompt"])}


def run(prompts, out, models, params, seed=0, batch_size=4, num_workers=2, worker=Worker):
    """Writes one JSON line a prompt to files in `out`; returns them all, in the prompts' order."""
    rows = rows_of(prompts, seed=seed, done={row["index"] for row in written(out)})
    if rows:
        data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // batch_size))
        data = data.map_batches(
            worker,
            fn_constructor_kwargs={
                **models,
                "params": params,
                "config": EngineConfig(num_blocks=500, num_threads=1),
            },
            batch_size=batch_size,
            concurrency=num_workers,
            num_cpus=1,
        )
        for batch in data.iter_batches(batch_size=None):  # as they end, in any order
            lines = [
                dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
            ]
            name = f"{min(line['index'] for line in lines):09d}.jsonl"
            text = "".join(json.dumps(line, default=lambda x: x.tolist()) + "\n" for line in lines)
            (Path(out) / f"{name}.part").write_text(text, "utf-8")
            (Path(out) / f"{name}.part").rename(Path(out) / name)  # whole, or not there
    return sorted(written(out), key=lambda row: row["index"])


def written(out):
    Path(out).mkdir(parents=True, exist_ok=True)
    for path in Path(out).glob("*.jsonl"):
        yield from map(json.loads, path.read_text("utf-8").splitlines())


if __name__ == "__main__":
    out, *paths = sys.argv[1:]
    methods = {1: SearchParams.base, 3: SearchParams.eft, 4: SearchParams.ivg}
    params = methods[len(paths)](max_tokens=16, temperature=0.7)
    models = dict(zip(("base", "tuned", "untuned", "value"), paths, strict=False))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for row in run([line.strip() for line in sys.stdin], out, models, params):
        print(row["prompt"] + row["response"])
    ray.shutdown()
