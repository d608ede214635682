// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' arguments and the table through which they are called.
//
// Each kernel is one source file (*_kernel.cc) compiled once an instruction set; its entry point is
// named by IVG_KERNEL, everything else in it lives in an anonymous namespace. To add a kernel: its
// argument struct here, its name in IVG_FOR_EACH_KERNEL, its source file.
#pragma once

#include <cstdint>

namespace ivg::cpu {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Store the keys (or values) of new tokens: pool[slot / 16, h, slot % 16, :] = src[t, h, :].
struct WriteKvArgs {
  const void* src;           // [num_tokens, num_heads, head_bytes], strided
  int64_t src_token_stride;  // bytes
  int64_t src_head_stride;   // bytes
  void* pool;                // [num_blocks, num_heads, 16, head_bytes], contiguous
  const int32_t* slots;      // [num_tokens]; -1: a pad token, not stored
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_bytes;
  int32_t num_threads;
};

// Copy whole blocks inside every pool: pool[dst] = pool[src] for each pair.
struct CopyBlocksArgs {
  void* const* pools;          // [num_pools]
  const int64_t* block_bytes;  // [num_pools]
  const int32_t* pairs;        // [num_pairs, 2] (src, dst); no dst occurs twice or as a src
  int64_t num_pools;
  int64_t num_pairs;
  int32_t num_threads;
};

// name, argument struct
#define IVG_FOR_EACH_KERNEL(X) \
  X(write_kv, WriteKvArgs)     \
  X(copy_blocks, CopyBlocksArgs)

struct CpuKernels {
  const char* isa;
#define IVG_DECLARE_MEMBER(name, Args) void (*name)(const Args&);
  IVG_FOR_EACH_KERNEL(IVG_DECLARE_MEMBER)
#undef IVG_DECLARE_MEMBER
};

// The kernels of the best instruction set that this processor has, or of the one that the
// environment variable IVG_FAST_CPU_ISA names (baseline, avx2, avx512). Throws std::runtime_error
// where that value is unknown or the processor lacks it. Thread-safe; decided once.
const CpuKernels& kernels();

}  // namespace ivg::cpu

#define IVG_CONCAT_(a, b) a##_##b
#define IVG_CONCAT(a, b) IVG_CONCAT_(a, b)
// The entry point of a kernel in the instruction set that is being compiled.
#define IVG_KERNEL(name) IVG_CONCAT(name, IVG_ISA)
