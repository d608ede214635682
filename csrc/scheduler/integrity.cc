// SPDX-License-Identifier: Apache-2.0
// What must hold between any two calls, recomputed from nothing but the candidates' own tables.
#include <algorithm>

#include "scheduler/errors.h"
#include "scheduler/scheduler.h"

namespace ivg {

void Scheduler::check_integrity() const {
  const std::lock_guard lock(mutex_);
  blocks_.check_integrity();
  std::vector<int32_t> references(blocks_.num_blocks(), 0);
  const auto refer = [&](const std::vector<int32_t>& table) {
    for (const int32_t block : table) {
      IVG_CHECK(block >= 0 && block < blocks_.num_blocks());
      ++references[block];
    }
  };
  int64_t blocks = 0;
  int32_t rows = 0;
  for (const Request* request : running_) {
    const Search& search = request->search;
    const RequestSpec& spec = search.spec;
    IVG_CHECK(request->state != State::kWaiting && request->state != State::kEnded);
    IVG_CHECK(requests_.at(request->id).get() == request);
    IVG_CHECK(search.pool.empty() || search.survivors.empty());
    IVG_CHECK(static_cast<int32_t>(search.pool.size()) <= spec.pool_size());
    IVG_CHECK(static_cast<int32_t>(search.survivors.size()) <= spec.beam_width);
    IVG_CHECK(search.num_blocks_held <= spec.worst_case_blocks());
    blocks += spec.worst_case_blocks();
    rows += spec.pool_size();
    refer(search.prompt_table);
    std::vector<int32_t> distinct = search.prompt_table;
    for (const auto* candidates : {&search.pool, &search.survivors}) {
      for (const Candidate& candidate : *candidates) {
        size_t num_records = candidate.recent.size();
        for (const Segment* s = candidate.past.get(); s; s = s->parent.get()) {
          num_records += s->records.size();
        }
        IVG_CHECK(static_cast<size_t>(candidate.length) == num_records);
        IVG_CHECK(candidate.length <= spec.max_tokens);
        refer(candidate.blocks);
        distinct.insert(distinct.end(), candidate.blocks.begin(), candidate.blocks.end());
        // Everything behind the last selection's full blocks is this candidate's alone: it will be
        // written.
        if (!candidate.is_finished() && search.survivors.empty()) {
          const int32_t first_own = search.chunk_start / kBlockSize;
          for (size_t i = first_own; i < candidate.blocks.size(); ++i) {
            IVG_CHECK(blocks_.ref_count(candidate.blocks[i]) == 1);
          }
        }
      }
    }
    std::sort(distinct.begin(), distinct.end());
    const auto num_distinct = std::unique(distinct.begin(), distinct.end()) - distinct.begin();
    IVG_CHECK(num_distinct == search.num_blocks_held);
  }
  for (int32_t block = 0; block < blocks_.num_blocks(); ++block) {
    IVG_CHECK(references[block] == blocks_.ref_count(block));
  }
  IVG_CHECK(blocks == reserved_blocks_ && blocks <= config_.num_blocks);
  IVG_CHECK(rows == reserved_rows_ && rows <= config_.max_num_rows);
  size_t num_live = 0;
  for (const auto& [id, request] : requests_) {
    IVG_CHECK(request->id == id);
    num_live += request->state != State::kEnded;
    IVG_CHECK(request->state != State::kEnded || request->search.num_blocks_held == 0);
  }
  IVG_CHECK(num_live == waiting_.size() + running_.size());
  IVG_CHECK(finished_.capacity() >= finished_.size() + num_live);
  IVG_CHECK(!running_.empty() || blocks_.num_used() == 0);
  for (const Request* request : waiting_) {
    IVG_CHECK(request->state == State::kWaiting && request->search.num_blocks_held == 0);
  }
}

}  // namespace ivg
