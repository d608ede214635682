# SPDX-License-Identifier: Apache-2.0
"""The engine in a loop of your own: requests come while others run, results as they end.

python examples/own_loop.py [--device cuda] BASE [TUNED UNTUNED [VALUE]] < prompts.txt

A service does the same with a queue in place of the lines, on the one thread that owns the engine.
"""

import argparse
import sys

from ivg_fast import CapacityError, Engine, InvalidParameterError, SearchParams


def serve(engine, lines, params, max_waiting=2):
    """Yields (prompt, output or error) as requests end; takes a new one where few are waiting."""
    lines, prompts, is_open = iter(lines), {}, True
    while is_open or engine.has_unfinished:
        while is_open and engine.stats()["num_requests_waiting"] < max_waiting:
            prompt = next(lines, None)
            if prompt is None:
                is_open = False
                break
            try:
                prompts[engine.add_request(prompt, params)] = prompt
            except (InvalidParameterError, CapacityError) as error:  # not queued: nothing to undo
                yield prompt, error
        for request_id, result in engine.step():  # one burst; a failed request harms no other
            yield prompts.pop(request_id), result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    models = arguments.models
    methods = {1: SearchParams.base, 3: SearchParams.eft, 4: SearchParams.ivg}
    params = methods[len(models)](max_tokens=16, temperature=0.7, deadline_s=60.0)
    with Engine.from_pretrained(*models, device=arguments.device) as engine:
        for prompt, result in serve(engine, (line.strip() for line in sys.stdin), params):
            if isinstance(result, Exception):
                print(f"{prompt}: {type(result).__name__}: {result}")
            else:
                print(prompt + result.outputs[0].text)
