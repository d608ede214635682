// SPDX-License-Identifier: Apache-2.0
// A plain C launcher: pointers, sizes and a stream, no CUDA headers for whoever calls it.
#pragma once

#include <cstdint>

namespace ivg::cuda {

// Architectures that this build holds machine code for, and PTX (for all later ones): "80 90 ...".
const char* architectures();

struct CopyBlocksArgs {
  const int64_t* pools;        // device, [num_pools] addresses, each a multiple of 16
  const int64_t* block_bytes;  // device, [num_pools], each a multiple of 16
  int64_t max_block_bytes;     // the largest of them
  const int32_t* pairs;        // host, [num_pairs, 2] (src, dst); no dst occurs twice or as a src
  int64_t num_pools;
  int64_t num_pairs;
  int32_t device;
  void* stream;  // a cudaStream_t
};

// pool[dst] = pool[src] for every pair and pool, by one launch for each 500 pairs; does not wait.
// Null, or what CUDA says went wrong.
const char* copy_blocks(const CopyBlocksArgs& args);

}  // namespace ivg::cuda
