# SPDX-License-Identifier: Apache-2.0
"""Compiles the sampling kernels ahead of time for the GPU architectures given, without a GPU.

Run by test_triton_aot.py: a process of its own, because Triton's interpreter and its compiler
exclude each other. Prints one JSON object: architecture -> kernel -> bytes of local memory.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ivg_fast.triton_kernels import guided_sample_jit, sample_filter_jit, token_logprobs

BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"
FLAGS = {"HAS_ROWS", "HAS_TUNED", "HAS_UNTUNED", "HAS_UNTIL", "HAS_MINUS", "HAS_THRESHOLDS"}
TYPES = {
    **dict.fromkeys(["base", "tuned", "untuned", "logits", "minus"], BF16),
    **dict.fromkeys(["base_stride", "tuned_stride", "untuned_stride"], "i64"),
    **dict.fromkeys(["logits_stride", "minus_stride"], "i64"),
    **dict.fromkeys(["rows", "banned_ids", "banned_until", "seeds", "candidate_ids"], I64),
    **dict.fromkeys(["token_ids", "input_ids"], I64),
    **dict.fromkeys(["positions", "model_positions", "slot_mapping", "block_table"], I32),
    **dict.fromkeys(["prompt_blocks", "bounds", "top_k"], I32),
    **dict.fromkeys(["weight", "temperature", "top_p", "min_p", "stats", "thresholds"], F32),
    **dict.fromkeys(["final_thresholds", "partials", "wanteds", "logprob", "base_logprob"], F32),
    **dict.fromkeys(["implicit_reward", "value", "out"], F32),
    "valid": "*i1",
    **dict.fromkeys(["vocab_size", "num_samples", "num_blocks", "table_width", "step"], "i32"),
    **dict.fromkeys(["num_passes", "num_tokens"], "i32"),
}
# A vocabulary of 262,144; bans, rows and every parameter a tensor: the most that is asked of them.
CONSTANTS = {"NUM_BANNED": 2, "BLOCK": 2048, "PADDED_BLOCKS": 128, "NUM_PIVOTS": 16, "NUM_ROLES": 4}
KERNELS = {
    "measure": (guided_sample_jit._measure, {}),
    "draw": (guided_sample_jit._draw, {}),
    "narrow_count": (sample_filter_jit._narrow, {"IS_MASS": False}),
    "narrow_mass": (sample_filter_jit._narrow, {"IS_MASS": True}),
    "close": (sample_filter_jit._close, {"IS_MASS": True}),
    "mask": (sample_filter_jit._mask, {}),
    "measure_rows": (token_logprobs._measure_rows, {}),
    "gather_logprobs": (token_logprobs._gather_logprobs, {}),
}


def constant(name: str) -> object:
    return True if name in FLAGS or name.endswith("_TENSOR") else CONSTANTS[name]


def local_bytes(cubin: bytes) -> int:
    """Local memory a thread: where spilled registers go."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = [int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text)]
    if not usage:
        raise RuntimeError(f"no resource usage in {text!r}")
    return sum(usage)


def compile_all(capability: int) -> dict[str, int]:
    results = {}
    for name, (kernel, fixed) in KERNELS.items():
        constants = {}
        signature = {}
        for parameter in kernel.arg_names:
            if parameter.isupper():
                constants[parameter] = fixed.get(parameter, None)
                if constants[parameter] is None:
                    constants[parameter] = constant(parameter)
                signature[parameter] = "constexpr"
            else:
                signature[parameter] = TYPES[parameter]
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        results[name] = local_bytes(compiled.asm["cubin"])
    return results


if __name__ == "__main__":
    print(json.dumps({name: compile_all(int(name)) for name in sys.argv[1:]}))
