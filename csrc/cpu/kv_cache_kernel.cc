// SPDX-License-Identifier: Apache-2.0
#include <string.h>

#include "cpu/kernels.h"

namespace ivg::cpu {

namespace {

constexpr int64_t kBlockSize = 16;

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 1 << 16;

int threads_for(int64_t bytes, int32_t num_threads) {
  const int64_t useful = bytes / kBytesPerThread + 1;
  return static_cast<int>(useful < num_threads ? useful : num_threads);
}

}  // namespace

void IVG_KERNEL(write_kv)(const WriteKvArgs& a) {
  const int threads = threads_for(a.num_tokens * a.num_heads * a.head_bytes, a.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const int64_t slot = a.slots[t];
    if (slot < 0) continue;
    const char* src = static_cast<const char*>(a.src) + t * a.src_token_stride;
    char* dst = static_cast<char*>(a.pool) +
                ((slot / kBlockSize) * a.num_heads * kBlockSize + slot % kBlockSize) * a.head_bytes;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      memcpy(dst + h * kBlockSize * a.head_bytes, src + h * a.src_head_stride,
             static_cast<size_t>(a.head_bytes));
    }
  }
}

void IVG_KERNEL(copy_blocks)(const CopyBlocksArgs& a) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < a.num_pools; ++p) bytes += a.num_pairs * a.block_bytes[p];
  const int threads = threads_for(bytes, a.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.num_pools * a.num_pairs; ++i) {
    const int64_t size = a.block_bytes[i / a.num_pairs];
    const int32_t* pair = a.pairs + 2 * (i % a.num_pairs);
    char* pool = static_cast<char*>(a.pools[i / a.num_pairs]);
    memcpy(pool + pair[1] * size, pool + pair[0] * size, static_cast<size_t>(size));
  }
}

}  // namespace ivg::cpu
