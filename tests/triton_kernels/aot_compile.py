# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels ahead of time for the GPU architectures given, without a GPU.

Run by test_triton_aot.py: a process of its own, because Triton's interpreter and its compiler
exclude each other. Prints one JSON object: architecture -> kernel -> [bytes of local memory of a
thread, bytes of shared memory of a program].
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

from ivg_fast.triton_kernels import (
    copy_blocks,
    guided_sample_jit,
    kv_write,
    paged_attention_jit,
    sample_filter_jit,
    token_logprobs,
)
from ivg_fast.triton_kernels.paged_attention import NUM_STAGES, NUM_WARPS, SPLITS_AT_ONCE, Tiles

BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"  # pointers
FLAGS = {"HAS_ROWS", "HAS_TUNED", "HAS_UNTUNED", "HAS_UNTIL", "HAS_MINUS", "HAS_THRESHOLDS"}
FLAGS |= {"HAS_CAP", "HAS_WINDOW", "HAS_SINKS", "HAS_VALUE"}
TYPES = {
    **dict.fromkeys(["base", "tuned", "untuned", "logits", "minus"], BF16),
    **dict.fromkeys(["base_stride", "tuned_stride", "untuned_stride"], "i64"),
    **dict.fromkeys(["logits_stride", "minus_stride"], "i64"),
    **dict.fromkeys(["rows", "banned_ids", "banned_until", "seeds", "candidate_ids"], I64),
    **dict.fromkeys(["token_ids", "input_ids"], I64),
    **dict.fromkeys(["positions", "slot_mapping", "block_table", "first_positions"], I32),
    **dict.fromkeys(["prompt_blocks", "bounds", "top_k", "limits", "records"], I32),
    **dict.fromkeys(["model_positions", "stop_ids"], I64),
    **dict.fromkeys(["role_stride", "plane_stride", "step_stride"], "i32"),
    **dict.fromkeys(["weight", "temperature", "top_p", "min_p", "stats", "thresholds"], F32),
    **dict.fromkeys(["final_thresholds", "partials", "wanteds", "logprob", "base_logprob"], F32),
    **dict.fromkeys(["implicit_reward", "value", "out"], F32),
    "valid": "*i1",
    **dict.fromkeys(["vocab_size", "num_samples", "num_blocks", "table_width", "step"], "i32"),
    **dict.fromkeys(["num_passes", "num_tokens"], "i32"),
    **dict.fromkeys(["query", "key_pool", "value_pool", "key"], BF16),
    **dict.fromkeys(["partials", "sinks"], F32),
    **dict.fromkeys(["items", "token_rows", "partial_starts", "query_start_loc"], I32),
    **dict.fromkeys(["prompt_lens", "response_lens", "response_starts", "slots", "pairs"], I32),
    **dict.fromkeys(["pools", "block_bytes"], I64),
    **dict.fromkeys(["query_token_stride", "query_head_stride", "num_stats"], "i32"),
    **dict.fromkeys(["key_token_stride", "key_head_stride"], "i32"),
    **dict.fromkeys(["value_token_stride", "value_head_stride", "sliding_window"], "i32"),
    **dict.fromkeys(["scale", "soft_cap"], "fp32"),
}
# A vocabulary of 262,144; bans, rows and every parameter a tensor: the most that is asked of them.
CONSTANTS = {"NUM_BANNED": 2, "BLOCK": 2048, "PADDED_BLOCKS": 128, "NUM_PIVOTS": 16}
CONSTANTS |= {"NUM_ROLES": 4, "NUM_STOPS": 2}
# Sizes of real layers: Llama 3, Gemma (a head of 256), and float32, which has no tensor cores.
LAYERS = {
    "bf16_128": Tiles(group=4, key_size=128, value_size=128, item_bytes=2),
    "bf16_256": Tiles(group=2, key_size=256, value_size=256, item_bytes=2),
    "fp32_128": Tiles(group=4, key_size=128, value_size=128, item_bytes=4),
}
WRITES = {"NUM_HEADS": 8, "KEY_SIZE": 192, "VALUE_SIZE": 128, "BLOCK": kv_write.BLOCK}
MERGES = {"VALUE_SIZE": 256, "PADDED_VALUE": 256, "NUM_AT_ONCE": SPLITS_AT_ONCE}
KERNELS = {
    "measure": (guided_sample_jit._measure, {}),
    "draw": (guided_sample_jit._draw, {}),
    "narrow_count": (sample_filter_jit._narrow, {"IS_MASS": False}),
    "narrow_mass": (sample_filter_jit._narrow, {"IS_MASS": True}),
    "close": (sample_filter_jit._close, {"IS_MASS": True}),
    "mask": (sample_filter_jit._mask, {}),
    "measure_rows": (token_logprobs._measure_rows, {}),
    "gather_logprobs": (token_logprobs._gather_logprobs, {}),
    "write_kv": (kv_write._write, WRITES),
    "copy_blocks": (copy_blocks._copy, {"BLOCK": copy_blocks.BLOCK}),
    "merge": (paged_attention_jit._merge, MERGES),
    **{
        f"attend_{name}": (
            paged_attention_jit._attend,
            {**tiles.constants(tiles.tile_tokens), "UPCAST": False},
        )
        for name, tiles in LAYERS.items()
    },
}
ATTEND_OPTIONS = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}


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


def compile_all(capability: int) -> dict[str, tuple[int, int]]:
    results = {}
    for name, (kernel, fixed) in KERNELS.items():
        constants, signature, aligned = {}, {}, {}
        is_attention = name.startswith("attend")
        for i, parameter in enumerate(kernel.arg_names):
            if parameter.isupper():
                constants[parameter] = fixed.get(parameter, None)
                if constants[parameter] is None:
                    constants[parameter] = constant(parameter)
                signature[parameter] = "constexpr"
                continue
            signature[parameter] = TYPES[parameter]
            if name == "attend_fp32_128" and TYPES[parameter] == BF16:
                signature[parameter] = F32
            # As Triton finds them in torch's tensors: without it no load would be a vector.
            if is_attention and (TYPES[parameter][0] == "*" or parameter.endswith("_stride")):
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=ATTEND_OPTIONS if is_attention else None,
        )
        results[name] = local_bytes(compiled.asm["cubin"]), compiled.metadata.shared
    return results


if __name__ == "__main__":
    print(json.dumps({name: compile_all(int(name)) for name in sys.argv[1:]}))
