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

// Attention of packed queries over the paged cache. Row i has prompt_lens[i] prompt keys, in the
// slots [0, P) of its first blocks, and response_lens[i] response keys, from the start of its block
// number response_block_start[i] on; its queries are the last ones of these positions. Trusts every
// index: AttentionBatch has checked them.
struct PagedAttentionArgs {
  const void* query;                    // [num_tokens, num_heads, key_size], strided
  int64_t query_token_stride;           // elements
  int64_t query_head_stride;            // elements
  const void* key_pool;                 // [num_blocks, num_kv_heads, 16, key_size], contiguous
  const void* value_pool;               // [num_blocks, num_kv_heads, 16, value_size], contiguous
  void* out;                            // [num_tokens, num_heads, value_size], contiguous
  const int32_t* block_table;           // [num_rows, table_width]
  const int32_t* query_start_loc;       // [num_rows + 1]
  const int32_t* prompt_lens;           // [num_rows]
  const int32_t* response_lens;         // [num_rows]
  const int32_t* response_block_start;  // [num_rows]
  const float* sinks;                   // [num_heads], or null
  int64_t num_rows;
  int64_t table_width;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t key_size;        // 1..kMaxHeadSize
  int64_t value_size;      // 1..kMaxHeadSize
  int64_t sliding_window;  // 0: none
  float scale;
  float soft_cap;  // 0: none
  DType dtype;     // of query, pools and out
  int32_t num_threads;
};
constexpr int64_t kMaxHeadSize = 512;

// name, argument struct
#define IVG_FOR_EACH_KERNEL(X)   \
  X(write_kv, WriteKvArgs)       \
  X(copy_blocks, CopyBlocksArgs) \
  X(paged_attention, PagedAttentionArgs)

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
