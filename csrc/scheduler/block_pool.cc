// SPDX-License-Identifier: Apache-2.0
#include "scheduler/block_pool.h"

#include <numeric>
#include <string>

#include "scheduler/errors.h"
#include "scheduler/memory.h"

namespace ivg {

BlockPool::BlockPool(int32_t num_blocks) {
  if (num_blocks < 1 || num_blocks > kMaxBlocks) {
    throw InvalidParameter("num_blocks", num_blocks,
                           "must be in [1, " + std::to_string(kMaxBlocks) + "]");
  }
  ref_counts_.assign(num_blocks, 0);
  free_.resize(num_blocks);
  std::iota(free_.rbegin(), free_.rend(), 0);
}

int32_t BlockPool::allocate() {
  if (free_.empty()) {
    throw CapacityExceeded("all " + std::to_string(num_blocks()) + " KV blocks are in use");
  }
  const int32_t block = free_.back();
  free_.pop_back();
  ref_counts_[block] = 1;
  return block;
}

void BlockPool::share(int32_t block) {
  check_in_use(block);
  ++ref_counts_[block];
}

bool BlockPool::free(int32_t block) {
  check_in_use(block);
  if (--ref_counts_[block] > 0) return false;
  free_.push_back(block);
  return true;
}

std::vector<int32_t> BlockPool::fork(const std::vector<int32_t>& table, int32_t num_tokens,
                                     std::vector<BlockCopy>* copies, std::vector<int32_t> buffer) {
  if (num_tokens < 0 || blocks_for(num_tokens) > static_cast<int64_t>(table.size())) {
    throw InvalidParameter("num_tokens", num_tokens, "must fit the table");
  }
  const int32_t num_full = num_tokens / kBlockSize;
  const bool has_partial = num_tokens % kBlockSize != 0;
  for (int32_t i = 0; i < blocks_for(num_tokens); ++i) check_in_use(table[i]);
  make_room(&buffer, table.size() + 1);  // a chunk often needs one block more
  if (has_partial) make_room(copies, copies->size() + 1);
  const int32_t fresh = has_partial ? allocate() : -1;  // the last that may throw: nothing changed
  buffer.assign(table.begin(), table.begin() + num_full);
  for (const int32_t block : buffer) ++ref_counts_[block];
  if (has_partial) {
    buffer.push_back(fresh);
    copies->push_back({table[num_full], fresh});
  }
  return buffer;
}

int32_t BlockPool::ref_count(int32_t block) const {
  if (block < 0 || block >= num_blocks()) {
    throw InvalidParameter("block", block, "must be in [0, num_blocks)");
  }
  return ref_counts_[block];
}

void BlockPool::check_in_use(int32_t block) const {
  if (ref_count(block) == 0) throw InvalidParameter("block", block, "must be in use");
}

void BlockPool::check_integrity() const {
  std::vector<bool> is_free(ref_counts_.size(), false);
  for (const int32_t block : free_) {
    IVG_CHECK(block >= 0 && block < num_blocks());
    IVG_CHECK(!is_free[block]);
    is_free[block] = true;
  }
  for (int32_t block = 0; block < num_blocks(); ++block) {
    IVG_CHECK(is_free[block] == (ref_counts_[block] == 0));
    IVG_CHECK(ref_counts_[block] >= 0);
  }
}

}  // namespace ivg
