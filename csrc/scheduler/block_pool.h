// SPDX-License-Identifier: Apache-2.0
// The allocator of KV blocks: reference counts, copy-on-write fork.
#pragma once

#include <cstdint>
#include <vector>

namespace ivg {

constexpr int32_t kBlockSize = 16;                      // token slots a block
constexpr int32_t kMaxBlocks = INT32_MAX / kBlockSize;  // slots are int32

constexpr int32_t blocks_for(int64_t num_tokens) {
  return static_cast<int32_t>((num_tokens + kBlockSize - 1) / kBlockSize);
}

// Copy block `src` to block `dst` in every pool of every role, before the next write.
struct BlockCopy {
  int32_t src;
  int32_t dst;
};

// Ids of fixed-size blocks with a reference count each. A block with more than one reference is
// never written.
class BlockPool {
 public:
  explicit BlockPool(int32_t num_blocks);

  // A block with one reference. Throws CapacityExceeded when none is free.
  int32_t allocate();
  // One more reference to a block in use.
  void share(int32_t block);
  // One reference less; true if that was the last and the block is free again.
  bool free(int32_t block);

  // The table of a copy-on-write child of a row that has written `num_tokens` tokens to `table`:
  //
  //   [0, num_tokens / 16)  full blocks, shared with the parent
  //   [num_tokens / 16, ..) the partly filled block, if any: a fresh one, its copy appended to
  //   `copies`
  //
  // `buffer` gives its memory to the result.
  std::vector<int32_t> fork(const std::vector<int32_t>& table, int32_t num_tokens,
                            std::vector<BlockCopy>* copies, std::vector<int32_t> buffer = {});

  int32_t ref_count(int32_t block) const;
  int32_t num_blocks() const { return static_cast<int32_t>(ref_counts_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_used() const { return num_blocks() - num_free(); }

  // Throws IntegrityError if the free list and the reference counts disagree.
  void check_integrity() const;

 private:
  void check_in_use(int32_t block) const;

  std::vector<int32_t> ref_counts_;
  std::vector<int32_t> free_;  // a stack: the block freed last is used next, while it is in cache
};

}  // namespace ivg
