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
// number response_block_start[i] on; its queries are the last ones of these positions. Rows of one
// group, [group_start[g], group_start[g + 1]), have the same prompt blocks, and all their queries
// stand behind the prompt; or a group is a single row. Trusts every index: AttentionBatch has
// checked them.
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
  const int32_t* group_start;           // [num_groups + 1]
  const float* sinks;                   // [num_heads], or null
  int64_t num_groups;
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

// Rows of logits, [rows, vocabulary]; data is null where there are none.
struct LogitRows {
  const void* data;
  int64_t row_stride;  // elements
  DType dtype;
};

// What one draw needs beside the logits. `greedy` has inverse_temperature 1 and no filters.
struct SampleParams {
  int64_t row;
  double uniform;
  float weight;
  float temperature;
  float inverse_temperature;
  float top_p;    // 1: off
  float min_p;    // 0: off
  int64_t top_k;  // 0: off
  bool greedy;
  const int32_t* banned;  // ids that may not be drawn
  int64_t num_banned;
};

// Entries that one stride of the inverse CDF covers, and one stretch of a thread's work.
constexpr int64_t kVocabBlock = 1024;
constexpr int64_t kBlocksPerItem = 8;
// Floats of statistics a block: maximum and sum for z, base, tuned and untuned.
constexpr int64_t kStatsPerBlock = 8;
// Floats of a worker's filter scratch a vocabulary entry: z, and three lists of survivors. Beside
// them kLanesPerBlock floats a block.
constexpr int64_t kFilterArrays = 4;
constexpr int64_t kLanesPerBlock = 16;

// A group is a run of samples with equal parameters and row: they share all but the draw.
struct GuidedSampleArgs {
  LogitRows base;
  LogitRows tuned;
  LogitRows untuned;
  int64_t vocab_size;
  const SampleParams* samples;  // [num_samples]
  const int64_t* group_begins;  // [num_groups + 1]
  int64_t num_groups;
  bool has_filters;
  float* stats;        // [num_groups, kStatsPerBlock, blocks], blocks padded to a multiple of 16
  float* filters;      // [min(num_groups, num_threads)] workers' scratch, where has_filters
  int64_t* token_ids;  // the outputs, [num_samples]
  float* logprob;
  float* base_logprob;
  float* implicit_reward;
  float* value;
  bool* valid;
  int32_t num_threads;
};

// log_softmax(logits[rows[i]])[token_ids[i]], less the same of `minus` where that is given.
struct TokenLogprobsArgs {
  LogitRows logits;
  LogitRows minus;
  int64_t vocab_size;
  const int64_t* rows;  // [num_tokens]
  const int64_t* token_ids;
  int64_t num_tokens;
  const int64_t* owners;  // [num_tokens]: the first of the run of tokens with this row
  float* stats;           // [num_tokens, 2, 2, blocks] as above
  float* out;
  int32_t num_threads;
};

// name, argument struct
#define IVG_FOR_EACH_KERNEL(X)           \
  X(write_kv, WriteKvArgs)               \
  X(copy_blocks, CopyBlocksArgs)         \
  X(paged_attention, PagedAttentionArgs) \
  X(guided_sample, GuidedSampleArgs)     \
  X(token_logprobs, TokenLogprobsArgs)

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
