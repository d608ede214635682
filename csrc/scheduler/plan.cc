// SPDX-License-Identifier: Apache-2.0
// What the device does next, written into arrays: bursts and score plans.
#include <algorithm>
#include <cstddef>

#include "scheduler/errors.h"
#include "scheduler/memory.h"
#include "scheduler/scheduler.h"

namespace ivg {

namespace {

int32_t slot_of(const std::vector<int32_t>& blocks, int32_t position) {
  return blocks[position / kBlockSize] * kBlockSize + position % kBlockSize;
}

}  // namespace

void BurstPlan::clear() {
  num_steps = table_width = 0;
  for (auto* ids : {&request_ids, &prefill_request_ids, &sample_seed}) ids->clear();
  for (auto* array :
       {&prompt_blocks, &num_samples, &prefill_begin, &prefill_end, &prefill_tables, &row_request,
        &row_token, &row_position, &row_slot, &row_tables, &sample_request, &sample_row,
        &sample_candidate, &sample_position, &sample_steps, &sample_slots, &sample_tables}) {
    array->clear();
  }
  row_roles.clear();
  copies.clear();
}

void BurstPlan::reserve(size_t num_requests, size_t num_rows, size_t num_samples) {
  const auto width = static_cast<size_t>(table_width);
  make_room(&request_ids, num_requests);
  for (auto* array : {&prompt_blocks, &this->num_samples}) make_room(array, num_requests);
  for (auto* array : {&row_request, &row_token, &row_position, &row_slot}) {
    make_room(array, num_rows);
  }
  make_room(&row_roles, num_rows);
  make_room(&row_tables, num_rows * width);
  make_room(&copies, num_samples);
  for (auto* array :
       {&sample_request, &sample_row, &sample_candidate, &sample_position, &sample_steps}) {
    make_room(array, num_samples);
  }
  make_room(&sample_seed, num_samples);
  make_room(&sample_slots, num_samples * static_cast<size_t>(num_steps));
  make_room(&sample_tables, num_samples * width);
}

void ScorePlan::clear() {
  table_width = max_new_tokens = 0;
  request_ids.clear();
  for (auto* array : {&num_rows, &prompt_blocks, &row_request, &row_candidate, &row_twin,
                      &row_start, &row_length, &row_tokens, &row_tables}) {
    array->clear();
  }
  row_finish.clear();
  row_adds_eos.clear();
  row_reward.clear();
}

// A chunk starts together with its cohort: not while a request of equal chunk length is inside a
// chunk that ends soon enough to wait for. One that is scored late leaves the others at its
// boundary: two of that kind would take turns for ever if they waited for each other.
bool Scheduler::may_start(const Request& request) const {
  const int32_t L = request.search.spec.chunk_length;
  if (L == 0) return true;
  return std::none_of(running_.begin(), running_.end(), [&](const Request* other) {
    if (other->state != State::kRunning || other->search.spec.chunk_length != L) return false;
    if (other->search.spec.is_scored_late) return false;
    const int32_t to_boundary = other->search.steps_to_boundary();
    return config_.max_join_steps < 0 || request.num_waited + to_boundary <= config_.max_join_steps;
  });
}

// Up to the nearest cohort's boundary, and no longer than any of them wants. A request that ends
// before it (max_tokens) is a pad until then.
int32_t Scheduler::burst_steps(const std::vector<Request*>& taking_part) const {
  int32_t to_boundary = config_.max_burst_steps;
  int32_t longest = 0;
  for (const Request* request : taking_part) {
    const Search& search = request->search;
    const int32_t chunk_step = request->state == State::kRunning ? search.chunk_step : 0;
    const int32_t length = search.length();
    if (search.spec.chunk_length > 0) {
      to_boundary = std::min(to_boundary, search.spec.chunk_length - chunk_step);
    }
    if (search.spec.max_burst_steps > 0) {
      to_boundary = std::min(to_boundary, search.spec.max_burst_steps);
    }
    longest = std::max(longest, search.spec.max_tokens - length);
  }
  return std::min(to_boundary, longest);
}

const BurstPlan& Scheduler::plan() {
  const std::lock_guard lock(mutex_);
  if (is_in_flight_) {
    throw InvalidState("plan() while a burst is in flight: commit_tokens() comes first");
  }
  plan_.clear();
  admit();

  plan_.table_width = table_width();
  plan_prefill();
  std::vector<Request*> taking_part, held_back;
  for (Request* request : running_) {
    const bool is_prefilled = request->prefill_end == request->search.spec.longest_prompt();
    if (request->state == State::kRunning) {
      taking_part.push_back(request);
    } else if (request->state == State::kReady && is_prefilled) {
      (may_start(*request) ? taking_part : held_back).push_back(request);
    }
  }
  // Contiguous by guidance, and those that start from their prompt's logits last: one call of the
  // sampler each.
  const auto starts = [](const Request* r) {
    return r->state == State::kReady && r->search.num_selections == 0;
  };
  std::stable_sort(taking_part.begin(), taking_part.end(), [&](const Request* a, const Request* b) {
    const int32_t ga = a->search.spec.guidance, gb = b->search.spec.guidance;
    return ga != gb ? ga < gb : starts(a) < starts(b);
  });

  plan_.num_steps = burst_steps(taking_part);
  if (config_.max_join_steps >= 0) {
    for (const Request* request : held_back) {  // at least 1 is left of what it may wait
      plan_.num_steps = std::min(plan_.num_steps, config_.max_join_steps - request->num_waited);
    }
  }
  reserve_plan(taking_part);
  // From here on nothing can fail.
  for (Request* request : running_) request->num_prefilled = request->prefill_end;
  for (Request* request : taking_part) plan_request(request);
  for (Request* request : held_back) request->num_waited += plan_.num_steps;

  const size_t num_samples = plan_.sample_request.size();
  plan_.sample_slots.assign(static_cast<size_t>(plan_.num_steps) * num_samples, -1);
  for (size_t b = 0; b < num_samples; ++b) {
    const int32_t Bp = plan_.prompt_blocks[plan_.sample_request[b]];
    const int32_t* table = plan_.sample_tables.data() + b * plan_.table_width + Bp;
    for (int32_t step = 0; step < plan_.sample_steps[b]; ++step) {
      const int32_t position = plan_.sample_position[b] + step;
      plan_.sample_slots[step * num_samples + b] =
          table[position / kBlockSize] * kBlockSize + position % kBlockSize;
    }
  }
  is_in_flight_ = num_samples > 0;
  return plan_;
}

int32_t Scheduler::table_width() const {
  int32_t width = 0;
  for (const Request* request : running_) {
    const RequestSpec& spec = request->search.spec;
    width = std::max(width, spec.prompt_blocks() + blocks_for(spec.max_length()));
  }
  return width;
}

// Takes all memory that what follows needs, up to the commit and the selection behind it.
void Scheduler::reserve_plan(const std::vector<Request*>& taking_part) {
  size_t num_rows = 0, num_samples = 0;
  for (Request* request : taking_part) {
    Search& search = request->search;
    const bool is_start = request->state == State::kReady;
    num_rows += is_start ? search.survivors.size() : search.pool.size();
    num_samples += is_start ? search.spec.pool_size() : search.pool.size();
    make_room(&row_of_rank_, search.survivors.size());
    search.prepare(std::min(plan_.num_steps, search.spec.max_tokens - search.length()));
  }
  plan_.reserve(taking_part.size(), num_rows, num_samples);
}

// A long prompt is read in pieces, so that those who decode meanwhile wait for no more than a
// piece.
void Scheduler::plan_prefill() {
  int32_t budget = config_.max_prefill_tokens < 0 ? INT32_MAX : config_.max_prefill_tokens;
  for (Request* request : running_) {
    const int32_t left = request->search.spec.longest_prompt() - request->num_prefilled;
    request->prefill_end = request->num_prefilled;
    if (left == 0 || budget == 0) continue;
    const int32_t num_tokens = std::min(left, budget);
    if (config_.max_prefill_tokens >= 0) budget -= num_tokens;
    plan_.prefill_request_ids.push_back(request->id);
    plan_.prefill_begin.push_back(request->num_prefilled);
    request->prefill_end += num_tokens;
    plan_.prefill_end.push_back(request->prefill_end);
    write_table(request->search, nullptr, plan_.table_width, &plan_.prefill_tables);
  }
}

void Scheduler::plan_request(Request* request) {
  Search& search = request->search;
  const RequestSpec& spec = search.spec;
  const auto index = static_cast<int32_t>(plan_.request_ids.size());
  const bool is_start = request->state == State::kReady;
  const bool is_from_prompt = is_start && search.num_selections == 0;

  const auto add_row = [&](const Candidate& candidate, uint32_t roles) {
    const int32_t position = candidate.length - 1;
    plan_.row_request.push_back(index);
    plan_.row_token.push_back(candidate.last_token());
    plan_.row_position.push_back(position);
    plan_.row_slot.push_back(slot_of(candidate.blocks, position));
    plan_.row_roles.push_back(roles);
    write_table(search, &candidate, plan_.table_width, &plan_.row_tables);
    return static_cast<int32_t>(plan_.row_request.size()) - 1;
  };

  // Logit row of each survivor by rank; the survivors' own tables are forwarded before the fork
  // shares them.
  row_of_rank_.clear();
  if (is_from_prompt) {
    search.branch_prompt();
  } else if (is_start) {
    for (const Candidate& survivor : search.survivors) {
      row_of_rank_.push_back(
          survivor.is_finished() ? -1 : add_row(survivor, spec.step_roles | spec.settle_roles));
    }
    search.fork(&plan_.copies);
  }
  const int32_t num_steps = std::min(plan_.num_steps, spec.max_tokens - search.length());
  int32_t num_samples = 0;
  for (Candidate& candidate : search.pool) {
    if (candidate.is_finished()) continue;
    int32_t row = -1;
    if (!is_start) {
      row = add_row(candidate, spec.step_roles);
    } else if (!is_from_prompt) {
      row = row_of_rank_[candidate.id % spec.beam_width];
    }
    search.reserve_tokens(&candidate, num_steps);
    plan_.sample_request.push_back(index);
    plan_.sample_row.push_back(row);
    plan_.sample_candidate.push_back(candidate.id);
    plan_.sample_position.push_back(candidate.length);
    plan_.sample_steps.push_back(num_steps);
    plan_.sample_seed.push_back(static_cast<int64_t>(spec.seed));
    write_table(search, &candidate, plan_.table_width, &plan_.sample_tables);
    ++num_samples;
  }
  plan_.request_ids.push_back(request->id);
  plan_.prompt_blocks.push_back(spec.prompt_blocks());
  plan_.num_samples.push_back(num_samples);
  request->state = State::kRunning;
  request->num_waited = 0;
  request->is_in_flight = true;
}

void Scheduler::write_table(const Search& search, const Candidate* candidate, int32_t width,
                            std::vector<int32_t>* tables) const {
  const size_t begin = tables->size();
  tables->insert(tables->end(), search.prompt_table.begin(), search.prompt_table.end());
  if (candidate != nullptr) {
    tables->insert(tables->end(), candidate->blocks.begin(), candidate->blocks.end());
  }
  // Unused entries are 0: a valid block, so that a kernel that prefetches stays in bounds.
  tables->resize(begin + width, 0);
}

const ScorePlan& Scheduler::plan_scores() {
  const std::lock_guard lock(mutex_);
  if (is_in_flight_) throw InvalidState("plan_scores() while a burst is in flight");
  ScorePlan& plan = score_plan_;
  plan.clear();
  plan.table_width = table_width();
  std::vector<Request*> requests;
  for (Request* request : running_) {
    if (request->state != State::kScoring || request->is_handed_out) continue;
    requests.push_back(request);
    for (const Candidate& candidate : request->search.pool) {
      if (!candidate.is_scored) {
        plan.max_new_tokens =
            std::max(plan.max_new_tokens, candidate.length - request->search.chunk_start);
      }
    }
  }
  for (Request* request : requests) {
    Search& search = request->search;
    const auto index = static_cast<int32_t>(plan.request_ids.size());
    const auto first_row = static_cast<int32_t>(plan.row_request.size());
    int32_t num_rows = 0;
    for (Candidate& candidate : search.pool) {
      if (candidate.is_scored) continue;
      plan.row_twin.push_back(first_row + num_rows);
      plan.row_request.push_back(index);
      plan.row_candidate.push_back(candidate.id);
      plan.row_start.push_back(search.chunk_start);
      plan.row_length.push_back(candidate.length);
      plan.row_finish.push_back(static_cast<uint8_t>(candidate.finish));
      const bool is_cut = candidate.finish == Finish::kLength;
      const bool adds_eos =
          candidate.finish == Finish::kStopText || (is_cut && search.spec.score_eos_on_truncation);
      if (adds_eos && search.spec.reads_eos) search.reserve_tokens(&candidate, 1);
      plan.row_adds_eos.push_back(adds_eos);
      plan.row_reward.push_back(candidate.reward);
      const size_t begin = plan.row_tokens.size();
      plan.row_tokens.resize(begin + plan.max_new_tokens, -1);
      for (size_t i = 0; i < candidate.recent.size(); ++i) {
        plan.row_tokens[begin + i] = candidate.recent[i].token;
      }
      write_table(search, &candidate, plan.table_width, &plan.row_tables);
      ++num_rows;
    }
    find_twins(search, first_row);
    plan.request_ids.push_back(request->id);
    plan.num_rows.push_back(num_rows);
    plan.prompt_blocks.push_back(search.spec.prompt_blocks());
  }
  for (Request* request : requests) request->is_handed_out = true;
  return plan;
}

// Candidates may draw the same text. Forwarded as separate rows their scores can differ in the last
// bit, and it would be rounding that breaks the tie.
void Scheduler::find_twins(const Search& search, int32_t first_row) {
  std::vector<const Candidate*> rows;
  hashes_.clear();
  for (const Candidate& candidate : search.pool) {
    if (candidate.is_scored) continue;
    hashes_.emplace_back(candidate.hash(), static_cast<int32_t>(rows.size()));
    rows.push_back(&candidate);
  }
  std::sort(hashes_.begin(), hashes_.end());
  size_t first = 0;  // of a run of equal hashes
  for (size_t i = 1; i < hashes_.size(); ++i) {
    if (hashes_[i].first != hashes_[first].first) {
      first = i;
    } else if (rows[hashes_[i].second]->has_same_tokens(*rows[hashes_[first].second])) {
      score_plan_.row_twin[first_row + hashes_[i].second] = first_row + hashes_[first].second;
    }
  }
}

}  // namespace ivg
