# SPDX-License-Identifier: Apache-2.0
"""guided_sample in a decode loop of your own: three Hugging Face decoders with one vocabulary.

python examples/op_in_your_decoder.py BASE TUNED UNTUNED "a prompt"

The op runs where the logits are: its Triton kernels on a GPU, the C++ ones on the CPU.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivg_fast.ops.guided_sample import guided_sample


@torch.inference_mode()
def decode(models, input_ids, num_tokens, seed=0, **sampling):
    """input_ids: int64[B, P] without padding; returns int64[B, P + num_tokens]."""
    token_ids, caches = input_ids, [None] * len(models)
    candidates = torch.arange(len(input_ids), device=input_ids.device)
    for position in range(num_tokens):
        outputs = [m(token_ids, past_key_values=c) for m, c in zip(models, caches, strict=True)]
        caches = [output.past_key_values for output in outputs]
        drawn = guided_sample(
            *(output.logits[:, -1] for output in outputs),
            **(sampling | {"seeds": seed, "candidate_ids": candidates, "positions": position}),
        )
        token_ids = drawn.token_ids[:, None]
        input_ids = torch.cat([input_ids, token_ids], dim=1)
    return input_ids


if __name__ == "__main__":
    *names, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(names[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [AutoModelForCausalLM.from_pretrained(name).eval().to(device) for name in names]
    prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    print(tokenizer.decode(decode(models, prompt_ids, 50, temperature=0.7)[0]))
