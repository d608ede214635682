# SPDX-License-Identifier: Apache-2.0
"""A value function of your own: any callable on texts; here a lexicon with a memory.

python examples/custom_value.py [--device cuda] BASE "a prompt"
"""

import argparse

from ivg_fast import Engine, ScoreInput, SearchParams

GOOD = {"good", "great", "love", "loved", "best", "wonderful", "excellent", "beautiful"}
BAD = {"bad", "worst", "boring", "hate", "hated", "awful", "terrible", "waste"}


class Lexicon:
    """A ValueFunction: list[ScoreInput] -> one finite number each, larger is better."""

    def __init__(self):
        self.num_calls = 0
        self._known = {}

    def __call__(self, inputs: list[ScoreInput]) -> list[float]:
        self.num_calls += 1
        return [self._value(item.response, item.is_finished) for item in inputs]

    def _value(self, text, is_finished):
        if (text, is_finished) not in self._known:
            # The last word may still grow: it counts once a space has ended it.
            words = text.lower().split() if is_finished else text.lower().rsplit(" ", 1)[0].split()
            words = [word.strip(".,!?") for word in words]
            self._known[text, is_finished] = sum((w in GOOD) - (w in BAD) for w in words)
        return float(self._known[text, is_finished])

    def close(self):
        """The engine whose `value` this is closes it."""
        self._known.clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    parser.add_argument("base")
    parser.add_argument("prompt")
    given = parser.parse_args()
    value, prompt = Lexicon(), given.prompt
    with Engine.from_pretrained(given.base, device=given.device) as engine:
        # A scorer of single requests; as the engine's own it would be its `value`.
        params = SearchParams.cbs(max_tokens=24, temperature=0.9, seed=0, scorer=value)
        (output,) = engine.generate(prompt, params)
        print(f"{output.outputs[0].score:+.0f}: {prompt}{output.outputs[0].text}")
        print(f"{value.num_calls} calls for {output.stats.num_selections} selections")
