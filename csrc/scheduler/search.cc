// SPDX-License-Identifier: Apache-2.0
#include "scheduler/search.h"

#include <algorithm>
#include <utility>

#include "scheduler/errors.h"
#include "scheduler/memory.h"

namespace ivg {

namespace {

uint64_t hash_tokens(const Segment* past, const std::vector<TokenRecord>& records) {
  uint64_t hash = past ? past->hash : 0;
  for (const TokenRecord& record : records) {
    hash = (hash ^ static_cast<uint32_t>(record.token)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return hash;
}

bool have_same_tokens(const std::vector<TokenRecord>& a, const std::vector<TokenRecord>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const TokenRecord& x, const TokenRecord& y) { return x.token == y.token; });
}

}  // namespace

Segment::Segment(std::shared_ptr<const Segment> parent, std::vector<TokenRecord> records) {
  fill(std::move(parent), std::move(records));
}

void Segment::fill(std::shared_ptr<const Segment> new_parent,
                   std::vector<TokenRecord> new_records) {
  parent = std::move(new_parent);
  records = std::move(new_records);
  hash = hash_tokens(parent.get(), records);
}

Segment::~Segment() {
  std::shared_ptr<const Segment> next = std::move(parent);
  while (next && next.use_count() == 1) {
    // Sole owner: nobody else can read it, so its parent may be taken before it goes.
    next = std::move(next->parent);
  }
}

std::vector<TokenRecord> Candidate::history() const {
  std::vector<TokenRecord> records(length);
  auto end = records.end();
  end = std::copy_backward(recent.begin(), recent.end(), end);
  for (const Segment* segment = past.get(); segment; segment = segment->parent.get()) {
    end = std::copy_backward(segment->records.begin(), segment->records.end(), end);
  }
  IVG_CHECK(end == records.begin());
  return records;
}

uint64_t Candidate::hash() const { return hash_tokens(past.get(), recent); }

bool Candidate::has_same_tokens(const Candidate& other) const {
  return past == other.past ? have_same_tokens(recent, other.recent)
                            : have_same_tokens(history(), other.history());
}

int32_t RequestSpec::longest_prompt() const {
  return *std::max_element(prompt_lens.begin(), prompt_lens.end());
}

int32_t RequestSpec::prompt_blocks() const { return blocks_for(longest_prompt()); }

int64_t RequestSpec::worst_case_blocks() const {
  const int64_t rows = pool_size();
  if (chunk_length == 0) return prompt_blocks() + rows * blocks_for(max_length());
  // A child owns its copy of the partly filled block (up to 15 tokens) and the chunk behind it.
  return prompt_blocks() + int64_t{beam_width} * blocks_for(max_length()) +
         rows * blocks_for(int64_t{kBlockSize} - 1 + chunk_length + reads_eos);
}

Search::Search(RequestSpec spec, BlockPool* blocks) : spec(std::move(spec)), blocks_(blocks) {
  reserve_pool(1);  // for the empty candidate of one that ends before it starts
}

void Search::reserve_pool(int32_t num_candidates) {
  for (auto* candidates : {&pool, &survivors, &moved_}) candidates->reserve(num_candidates);
  for (auto* pointers : {&order_, &kept_}) pointers->reserve(num_candidates);
  spare_tables_.reserve(num_candidates);
  spare_records_.reserve(num_candidates);
}

int32_t Search::steps_to_boundary() const {
  const int32_t to_limit = spec.max_tokens - length();
  if (spec.chunk_length == 0) return to_limit;
  return std::min(spec.chunk_length - chunk_step, to_limit);
}

bool Search::is_at_boundary() const {
  return steps_to_boundary() == 0 ||
         std::all_of(pool.begin(), pool.end(), [](const Candidate& c) { return c.is_finished(); });
}

void Search::allocate_prompt() {
  reserve_pool(spec.pool_size());
  prompt_table.reserve(spec.prompt_blocks());
  for (int32_t i = 0; i < spec.prompt_blocks(); ++i) prompt_table.push_back(blocks_->allocate());
  num_blocks_held = peak_blocks = spec.prompt_blocks();
}

namespace {

template <class T>
std::vector<T> take(std::vector<std::vector<T>>* spares) {
  if (spares->empty()) return {};
  std::vector<T> buffer = std::move(spares->back());
  spares->pop_back();
  return buffer;
}

// The next `count` that are taken have room for `size` elements each.
template <class T>
void stock(std::vector<std::vector<T>>* spares, size_t count, size_t size) {
  if (spares->size() < count) spares->resize(count);
  for (auto spare = spares->end() - static_cast<std::ptrdiff_t>(count); spare != spares->end();
       ++spare) {
    make_room(&*spare, size);
  }
}

}  // namespace

void Search::prepare(int32_t num_steps) {
  const auto num_new = static_cast<size_t>(num_steps);
  for (Candidate& candidate : pool) {
    if (candidate.is_finished()) continue;
    make_room(&candidate.blocks, blocks_for(candidate.length + num_steps));
    make_room(&candidate.recent, candidate.recent.size() + num_new);
  }
  if (!pool.empty()) return;
  size_t num_blocks = blocks_for(length() + num_steps);
  for (Candidate& survivor : survivors) {
    num_blocks = std::max(num_blocks, survivor.blocks.size() + 1);
    if (!survivor.is_finished()) make_room(&survivor.blocks, num_blocks);
  }
  stock(&spare_tables_, spec.pool_size(), num_blocks);
  stock(&spare_records_, spec.pool_size(), num_new);
  spare_segments_.reserve(survivors.size());
  while (spare_segments_.size() < survivors.size()) {
    spare_segments_.push_back(std::make_shared<Segment>());
  }
}

void Search::branch_prompt() {
  pool.resize(spec.pool_size());
  for (int32_t id = 0; id < spec.pool_size(); ++id) {
    pool[id].id = id;
    pool[id].blocks = take(&spare_tables_);
    pool[id].recent = take(&spare_records_);
  }
}

void Search::fork(std::vector<BlockCopy>* copies) {
  const int32_t W = spec.beam_width;
  const int32_t K = spec.num_candidates;
  const size_t copies_before = copies->size();
  for (Candidate& survivor : survivors) {
    if (survivor.recent.empty()) continue;  // a clone that has survived again
    std::shared_ptr<Segment> segment;
    if (spare_segments_.empty()) {
      segment = std::make_shared<Segment>();
    } else {
      segment = std::move(spare_segments_.back());
      spare_segments_.pop_back();
    }
    segment->fill(std::move(survivor.past), std::move(survivor.recent));
    survivor.past = std::move(segment);
    survivor.recent.clear();
  }
  pool.clear();
  pool.reserve(spec.pool_size());
  for (int32_t c = 0; c < K; ++c) {
    for (int32_t r = 0; r < static_cast<int32_t>(survivors.size()); ++r) {
      Candidate& survivor = survivors[r];
      if (c > 0 && spec.dedup_finished && survivor.is_finished()) continue;
      Candidate child;
      child.id = c * W + r;
      child.finish = survivor.finish;
      child.stop_index = survivor.stop_index;
      child.length = survivor.length;
      child.past = survivor.past;
      child.reward = survivor.reward;
      child.score = survivor.score;
      child.is_scored = survivor.is_finished();
      child.recent = take(&spare_records_);
      if (c + 1 < K) {
        const int32_t num_written = survivor.is_finished() ? 0 : survivor.length;
        child.blocks = blocks_->fork(survivor.blocks, num_written, copies, take(&spare_tables_));
      } else {  // the survivor's own table, its partly filled block included
        child.blocks = std::move(survivor.blocks);
      }
      pool.push_back(std::move(child));
    }
  }
  survivors.clear();
  const int32_t num_copied = static_cast<int32_t>(copies->size() - copies_before);
  num_blocks_copied += num_copied;
  num_blocks_held += num_copied;
  peak_blocks = std::max(peak_blocks, num_blocks_held);
  chunk_start = length();
  chunk_step = 0;
}

void Search::reserve_tokens(Candidate* candidate, int32_t num_tokens) {
  const size_t needed = blocks_for(candidate->length + num_tokens);
  make_room(&candidate->blocks, needed);
  while (candidate->blocks.size() < needed) {
    candidate->blocks.push_back(blocks_->allocate());
    ++num_blocks_held;
  }
  peak_blocks = std::max(peak_blocks, num_blocks_held);
}

// `kept_`, as pointers: sorting them is several times cheaper than sorting the rows themselves.
void Search::move_in_order(std::vector<Candidate>* out) {
  for (Candidate* candidate : kept_) moved_.push_back(std::move(*candidate));
  out->swap(moved_);
  moved_.clear();
}

namespace {

bool is_better(const Candidate* a, const Candidate* b) {
  return a->score != b->score ? a->score > b->score : a->id < b->id;
}

}  // namespace

bool Search::select() {
  ++num_selections;
  has_diverged_ = false;
  order_.clear();
  for (Candidate& candidate : pool) order_.push_back(&candidate);
  const auto first_lost =
      order_.begin() +
      std::min<std::ptrdiff_t>(spec.beam_width, static_cast<std::ptrdiff_t>(order_.size()));
  std::partial_sort(order_.begin(), first_lost, order_.end(), is_better);
  const auto is_finished = [](const Candidate* c) { return c->is_finished(); };
  // At max_tokens nobody is left unfinished.
  if (std::all_of(order_.begin(), first_lost, is_finished)) {
    finalize(Finish::kAbort);
    return true;
  }
  for (auto loser = first_lost; loser != order_.end(); ++loser) drop(*loser);
  kept_.assign(order_.begin(), first_lost);
  for (Candidate* survivor : kept_) {
    if (survivor->is_finished()) release(survivor);
  }
  move_in_order(&survivors);
  pool.clear();
  return false;
}

namespace {

// Until where in [begin, end) the candidate says the same as `tail`, which holds those tokens of
// `other`.
int32_t shared_until(const Candidate& candidate, const Candidate& other,
                     const std::vector<int32_t>& tail, int32_t begin, int32_t end) {
  int32_t start = candidate.length;
  const auto compare = [&](const std::vector<TokenRecord>& records) {
    const int32_t stop = start;
    start -= static_cast<int32_t>(records.size());
    for (int32_t t = std::max(start, begin); t < std::min(stop, end); ++t) {
      if (records[t - start].token != tail[t - begin]) end = t;
    }
  };
  compare(candidate.recent);
  const Segment* segment = candidate.past.get();
  // A past that both have needs no look.
  while (segment != nullptr && segment != other.past.get() && start > begin) {
    compare(segment->records);
    segment = segment->parent.get();
  }
  return end;
}

}  // namespace

void Search::take_decided(std::vector<int32_t>* tokens) {
  const std::vector<Candidate>& alive = pool.empty() ? survivors : pool;
  if (alive.empty() || has_diverged_) return;
  const int32_t begin = num_decided_;
  int32_t end = alive.front().length;
  bool has_diverged = false;
  for (const Candidate& candidate : alive) {
    end = std::min(end, candidate.length - candidate.is_finished());
    has_diverged |= candidate.is_finished();  // its tokens have an end
  }
  if (end <= begin) {
    has_diverged_ = has_diverged;
    return;
  }
  const Candidate& first = alive.front();
  std::vector<int32_t> tail(end - begin);
  int32_t start = first.length;
  const auto copy = [&](const std::vector<TokenRecord>& records) {
    const int32_t stop = start;
    start -= static_cast<int32_t>(records.size());
    for (int32_t t = std::max(start, begin); t < std::min(stop, end); ++t) {
      tail[t - begin] = records[t - start].token;
    }
  };
  copy(first.recent);
  for (const Segment* segment = first.past.get(); segment != nullptr && start > begin;
       segment = segment->parent.get()) {
    copy(segment->records);
  }
  const int32_t num_comparable = end;
  for (size_t i = 1; i < alive.size() && end > begin; ++i) {
    end = shared_until(alive[i], first, tail, begin, end);
  }
  tokens->insert(tokens->end(), tail.begin(), tail.begin() + (end - begin));
  has_diverged_ = has_diverged || end < num_comparable;
  num_decided_ = end;
}

void Search::finalize(Finish reason) {
  if (pool.empty()) pool.swap(survivors);  // between a selection and the fork
  if (pool.empty()) pool.resize(1);        // before the first token: one empty candidate
  for (Candidate& candidate : pool) {
    if (!candidate.is_finished()) candidate.finish = reason;
  }
  report();
}

void Search::report() {
  order_.clear();
  kept_.clear();
  for (Candidate& candidate : pool) order_.push_back(&candidate);
  std::sort(order_.begin(), order_.end(), is_better);
  for (Candidate* candidate : order_) {
    if (static_cast<int32_t>(kept_.size()) == spec.num_outputs) break;
    // Clones of one survivor share its past and have nothing of their own.
    const bool is_clone = candidate->recent.empty() &&
                          std::any_of(kept_.begin(), kept_.end(), [&](const Candidate* c) {
                            return c->recent.empty() && c->past == candidate->past;
                          });
    if (!is_clone) kept_.push_back(candidate);
  }
  release_all();
  move_in_order(&pool);
}

void Search::release(Candidate* candidate) {
  for (const int32_t block : candidate->blocks) num_blocks_held -= blocks_->free(block);
  candidate->blocks.clear();
}

void Search::drop(Candidate* candidate) {
  release(candidate);
  candidate->recent.clear();
  if (spare_tables_.size() < spare_tables_.capacity()) {
    spare_tables_.push_back(std::move(candidate->blocks));
  }
  if (spare_records_.size() < spare_records_.capacity()) {
    spare_records_.push_back(std::move(candidate->recent));
  }
}

void Search::release_all() {
  for (Candidate& candidate : pool) release(&candidate);
  for (Candidate& candidate : survivors) release(&candidate);
  for (const int32_t block : prompt_table) num_blocks_held -= blocks_->free(block);
  prompt_table.clear();
}

}  // namespace ivg
