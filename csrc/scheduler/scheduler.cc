// SPDX-License-Identifier: Apache-2.0
#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "scheduler/errors.h"
#include "scheduler/memory.h"

namespace ivg {

namespace {

// A request's W*K and T are bounded so that no product of theirs overflows and no plan is absurdly
// large.
constexpr int32_t kMaxTokens = 1 << 24;

void require(bool ok, const char* parameter, long long value, const char* requirement) {
  if (!ok) throw InvalidParameter(parameter, value, requirement);
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config) : config_(config), blocks_(config.num_blocks) {
  require(config.num_roles >= 1 && config.num_roles <= 32, "num_roles", config.num_roles,
          "must be in [1, 32]");
  require(config.max_num_rows >= 1, "max_num_rows", config.max_num_rows, "must be at least 1");
  require(config.max_burst_steps >= 1, "max_burst_steps", config.max_burst_steps,
          "must be at least 1");
  require(config.max_join_steps >= -1, "max_join_steps", config.max_join_steps,
          "must be at least -1");
  require(config.max_queued_requests >= -1, "max_queued_requests", config.max_queued_requests,
          "must be at least -1");
  require(config.max_prefill_tokens == -1 || config.max_prefill_tokens >= 1, "max_prefill_tokens",
          config.max_prefill_tokens, "must be -1 or at least 1");
}

void Scheduler::validate(const RequestSpec& spec) const {
  require(static_cast<int32_t>(spec.prompt_lens.size()) == config_.num_roles, "prompt_lens",
          static_cast<long long>(spec.prompt_lens.size()), "must have one entry a role");
  for (int32_t role = 0; role < config_.num_roles; ++role) {
    const int32_t length = spec.prompt_lens[role];
    require(length >= 0 && length <= kMaxTokens, "prompt_lens", length, "must be in [0, 2^24]");
    const bool is_used = ((spec.step_roles | spec.settle_roles) >> role) & 1u;
    require(length > 0 || !is_used, "prompt_lens", length,
            "must be positive for a role that takes part");
  }
  require(spec.step_roles & 1u, "step_roles", spec.step_roles, "must contain role 0, the base");
  const auto names_roles = [&](uint32_t roles) {
    return static_cast<uint64_t>(roles) >> config_.num_roles == 0;
  };
  require(names_roles(spec.step_roles), "step_roles", spec.step_roles, "must name existing roles");
  require(names_roles(spec.settle_roles), "settle_roles", spec.settle_roles,
          "must name existing roles");
  require(spec.beam_width >= 1 && spec.beam_width <= kMaxTokens, "beam_width", spec.beam_width,
          "must be in [1, 2^24]");
  require(spec.num_candidates >= 1 && spec.num_candidates <= kMaxTokens / spec.beam_width,
          "num_candidates", spec.num_candidates,
          "must be at least 1 and beam_width * num_candidates at most 2^24");
  require(spec.chunk_length >= 0, "chunk_length", spec.chunk_length,
          "must be positive, or 0 for none");
  require(spec.max_tokens >= 1 && spec.max_tokens <= kMaxTokens, "max_tokens", spec.max_tokens,
          "must be in [1, 2^24]");
  require(spec.num_outputs >= 1 && spec.num_outputs <= spec.pool_size(), "num_outputs",
          spec.num_outputs, "must be in [1, beam_width * num_candidates]");
  require(spec.max_burst_steps >= 0, "max_burst_steps", spec.max_burst_steps,
          "must be positive, or 0 for none");
  require(spec.guidance >= 0, "guidance", spec.guidance, "must not be negative");
}

void Scheduler::check_fits(const RequestSpec& spec) const {
  if (spec.pool_size() > config_.max_num_rows) {
    throw CapacityExceeded(
        "the request needs beam_width * num_candidates = " + std::to_string(spec.pool_size()) +
        " rows, max_num_rows is " + std::to_string(config_.max_num_rows));
  }
  if (spec.worst_case_blocks() > config_.num_blocks) {
    throw CapacityExceeded("the request can need " + std::to_string(spec.worst_case_blocks()) +
                           " KV blocks of " + std::to_string(kBlockSize) +
                           " tokens, the pool has " + std::to_string(config_.num_blocks));
  }
}

void Scheduler::check_request(RequestSpec spec) const { check_and_simplify(spec); }

void Scheduler::check_and_simplify(RequestSpec& spec) const {
  validate(spec);
  // One candidate has nothing to be selected from: chunks could not change its tokens, only cost
  // scores. And a chunk that no response outgrows is none: there is no fork to keep blocks for and
  // no cohort to wait for.
  if (spec.pool_size() == 1 || spec.chunk_length >= spec.max_tokens) spec.chunk_length = 0;
  check_fits(spec);
}

int64_t Scheduler::add_request(RequestSpec spec) {
  const std::lock_guard lock(mutex_);
  check_and_simplify(spec);
  if (config_.max_queued_requests >= 0 &&
      static_cast<int32_t>(waiting_.size()) >= config_.max_queued_requests) {
    throw QueueFull(std::to_string(waiting_.size()) + " requests wait, max_queued_requests is " +
                    std::to_string(config_.max_queued_requests));
  }
  make_room(&finished_, finished_.size() + requests_.size() + 1);
  auto request = std::make_unique<Request>(next_id_, std::move(spec), &blocks_);
  waiting_.push_back(request.get());
  try {
    requests_.emplace(next_id_, std::move(request));
  } catch (...) {
    waiting_.pop_back();
    throw;
  }
  return next_id_++;
}

Scheduler::Request* Scheduler::find_live(int64_t request_id) const {
  const auto it = requests_.find(request_id);
  if (it == requests_.end() || it->second->state == State::kEnded) return nullptr;
  return it->second.get();
}

Scheduler::Request& Scheduler::find(int64_t request_id) const {
  Request* request = find_live(request_id);
  require(request != nullptr, "request_id", request_id, "must be a live request");
  return *request;
}

void Scheduler::check_given_out(int64_t request_id) const {
  require(request_id >= 0 && request_id < next_id_, "request_id", request_id,
          "must have been given out");
}

bool Scheduler::abort(int64_t request_id, Finish reason) {
  const std::lock_guard lock(mutex_);
  check_given_out(request_id);
  require(reason == Finish::kAbort || reason == Finish::kDeadline, "reason",
          static_cast<int>(reason), "must be kAbort or kDeadline");
  Request* request = find_live(request_id);
  if (request == nullptr) return false;
  if (request->is_in_flight) {
    // The device may still write the request's blocks: they must not be given away before the
    // commit.
    if (request->abort_reason == Finish::kNone) request->abort_reason = reason;
  } else {
    request->search.finalize(reason);
    finish(request);
  }
  return true;
}

// Moves a request whose search is over out of the books; its result stays until it is taken.
void Scheduler::finish(Request* request) {
  const Search& search = request->search;
  IVG_CHECK(search.num_blocks_held == 0);
  finished_.push_back(request->id);
  const State state = std::exchange(request->state, State::kEnded);
  if (state == State::kWaiting) {
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), request));
    return;
  }
  reserved_blocks_ -= search.spec.worst_case_blocks();
  reserved_rows_ -= search.spec.pool_size();
  running_.erase(std::find(running_.begin(), running_.end(), request));
}

std::vector<TokenRecord> Scheduler::history(int64_t request_id, int32_t candidate_id) const {
  const std::lock_guard lock(mutex_);
  for (const Candidate& candidate : find(request_id).search.pool) {
    if (candidate.id == candidate_id) return candidate.history();
  }
  throw InvalidParameter("candidate_id", candidate_id, "must be in the request's pool");
}

std::vector<int32_t> Scheduler::take_decided(int64_t request_id) {
  const std::lock_guard lock(mutex_);
  check_given_out(request_id);
  std::vector<int32_t> tokens;
  if (Request* request = find_live(request_id)) request->search.take_decided(&tokens);
  return tokens;
}

std::vector<int64_t> Scheduler::take_finished() {
  const std::lock_guard lock(mutex_);
  std::vector<int64_t> taken = finished_;
  finished_.clear();  // it keeps its memory: the next that ends must find room
  return taken;
}

SearchResult Scheduler::take_result(int64_t request_id) {
  const std::lock_guard lock(mutex_);
  const auto it = requests_.find(request_id);
  require(it != requests_.end() && it->second->state == State::kEnded, "request_id", request_id,
          "must have ended and not been taken");
  Search& search = it->second->search;
  SearchResult result{std::move(search.pool), search.num_selections, search.num_blocks_copied,
                      search.peak_blocks};
  requests_.erase(it);
  return result;
}

// First come first served: nobody overtakes the head of the queue, so nobody starves. The worst
// case is reserved, so an admitted request never runs out of blocks.
void Scheduler::admit() {
  while (!waiting_.empty()) {
    Request* request = waiting_.front();
    const RequestSpec& spec = request->search.spec;
    if (reserved_blocks_ + spec.worst_case_blocks() > config_.num_blocks ||
        reserved_rows_ + spec.pool_size() > config_.max_num_rows) {
      return;
    }
    make_room(&running_, running_.size() + 1);
    request->search.allocate_prompt();
    reserved_blocks_ += spec.worst_case_blocks();
    reserved_rows_ += spec.pool_size();
    request->state = State::kReady;
    running_.push_back(request);
    waiting_.pop_front();
  }
}

// All of it is checked before any of it is taken.
void Scheduler::validate(const CommittedTokens& c) {
  const auto num_samples = static_cast<int32_t>(plan_.sample_request.size());
  if (c.num_samples != num_samples) {
    throw InvalidParameter("num_samples", c.num_samples,
                           "must be the plan's " + std::to_string(num_samples));
  }
  if (c.num_steps < 0 || c.num_steps > plan_.num_steps) {
    throw InvalidParameter("num_steps", c.num_steps,
                           "must be in [0, " + std::to_string(plan_.num_steps) + "]");
  }
  int32_t b = 0;
  for (size_t i = 0; i < plan_.request_ids.size(); ++i) {
    const bool is_aborted = find(plan_.request_ids[i]).abort_reason != Finish::kNone;
    for (const int32_t end = b + plan_.num_samples[i]; b < end; ++b) {
      const auto finish = static_cast<Finish>(c.finish[b]);
      const int32_t num_tokens = c.num_tokens[b];
      const int32_t planned = plan_.sample_steps[b];
      const bool is_stopped = finish == Finish::kStop || finish == Finish::kStopText;
      if (!is_stopped && finish != Finish::kNone) {
        throw InvalidParameter("finish", c.finish[b], "must be kNone, kStop or kStopText");
      }
      const int32_t least = is_stopped ? 1 : is_aborted ? 0 : planned;
      if (num_tokens < least || num_tokens > std::min(planned, c.num_steps)) {
        throw InvalidParameter("num_tokens", num_tokens,
                               "must be the planned " + std::to_string(planned) +
                                   ", or fewer where the sample has finished");
      }
      for (int32_t step = 0; step < num_tokens; ++step) {
        const int32_t token = c.tokens[int64_t{step} * num_samples + b];
        if (token < 0) throw InvalidParameter("tokens", token, "must not be negative");
      }
    }
  }
}

void Scheduler::commit_tokens(const CommittedTokens& committed) {
  const std::lock_guard lock(mutex_);
  if (!is_in_flight_) throw InvalidState("commit_tokens() without a burst in flight");
  validate(committed);
  is_in_flight_ = false;
  int32_t sample = 0;
  for (size_t i = 0; i < plan_.request_ids.size(); ++i) {
    Request& request = find(plan_.request_ids[i]);
    request.is_in_flight = false;
    append(&request.search, committed, sample);
    sample += plan_.num_samples[i];
    if (request.abort_reason != Finish::kNone) {
      request.search.finalize(request.abort_reason);
      finish(&request);
    } else if (request.search.is_at_boundary()) {
      reach_boundary(&request);
    }
  }
}

std::vector<int64_t> Scheduler::give_up() {
  const std::lock_guard lock(mutex_);
  std::vector<int64_t> ids = plan_.request_ids;
  ids.insert(ids.end(), plan_.prefill_request_ids.begin(), plan_.prefill_request_ids.end());
  is_in_flight_ = false;
  plan_.clear();
  const auto has_ended = [&](int64_t id) {  // a request may be in both lists
    Request* request = find_live(id);
    if (request == nullptr) return true;
    const Finish reason = request->abort_reason;
    request->search.finalize(reason == Finish::kNone ? Finish::kAbort : reason);
    finish(request);
    return false;
  };
  ids.erase(std::remove_if(ids.begin(), ids.end(), has_ended), ids.end());
  return ids;
}

void Scheduler::append(Search* search, const CommittedTokens& c, int32_t sample) const {
  for (Candidate& candidate : search->pool) {
    if (candidate.is_finished()) continue;
    const int32_t num_tokens = c.num_tokens[sample];
    const size_t before = candidate.recent.size();
    candidate.recent.resize(before + num_tokens);
    for (int32_t step = 0; step < num_tokens; ++step) {
      const int64_t at = int64_t{step} * c.num_samples + sample;
      candidate.recent[before + step] = {c.tokens[at], c.logprobs[at], c.base_logprobs[at],
                                         c.rewards[at]};
      candidate.reward += c.rewards[at];
    }
    candidate.length += num_tokens;
    candidate.finish = static_cast<Finish>(c.finish[sample]);
    candidate.stop_index = c.stop_index[sample];
    if (!candidate.is_finished() && candidate.length == search->spec.max_tokens) {
      candidate.finish = Finish::kLength;
    }
    ++sample;
  }
  search->chunk_step += std::min(plan_.num_steps, search->spec.max_tokens - search->length());
}

void Scheduler::reach_boundary(Request* request) {
  Search& search = request->search;
  if (search.spec.has_scorer) {
    request->state = State::kScoring;
    request->is_handed_out = false;
  } else if (search.select()) {
    finish(request);
  } else {
    request->state = State::kReady;
  }
}

bool Scheduler::commit_scores(int64_t request_id, const double* scores, int32_t num_scores,
                              const float* rewards, int32_t rewards_stride) {
  const std::lock_guard lock(mutex_);
  check_given_out(request_id);
  Request* request = find_live(request_id);
  if (request == nullptr) return false;
  if (request->state != State::kScoring || !request->is_handed_out) {
    throw InvalidState("commit_scores() for a request that is not being scored");
  }
  std::vector<Candidate*> unscored;
  for (Candidate& candidate : request->search.pool) {
    if (!candidate.is_scored) unscored.push_back(&candidate);
  }
  if (num_scores != static_cast<int32_t>(unscored.size())) {
    throw InvalidParameter("num_scores", num_scores,
                           "must be the score plan's " + std::to_string(unscored.size()));
  }
  for (int32_t i = 0; i < num_scores; ++i) {
    if (!std::isfinite(scores[i])) {
      throw InvalidParameter("scores", i, "must be finite at every index");
    }
    if (rewards != nullptr && rewards_stride < static_cast<int32_t>(unscored[i]->recent.size())) {
      throw InvalidParameter("rewards", rewards_stride, "must have a column for every new token");
    }
  }
  for (int32_t i = 0; i < num_scores; ++i) {
    Candidate* candidate = unscored[i];
    candidate->score = scores[i];
    candidate->is_scored = true;
    if (rewards == nullptr) continue;
    for (size_t t = 0; t < candidate->recent.size(); ++t) {
      const float reward = rewards[int64_t{i} * rewards_stride + static_cast<int64_t>(t)];
      candidate->reward += static_cast<double>(reward) - candidate->recent[t].reward;
      candidate->recent[t].reward = reward;
    }
  }
  if (request->search.select()) {
    finish(request);
  } else {
    request->state = State::kReady;
  }
  return true;
}

bool Scheduler::has_unfinished() const {
  const std::lock_guard lock(mutex_);
  return !waiting_.empty() || !running_.empty();
}

SchedulerStats Scheduler::stats() const {
  const std::lock_guard lock(mutex_);
  return {static_cast<int32_t>(waiting_.size()), static_cast<int32_t>(running_.size()),
          blocks_.num_blocks(), blocks_.num_used(), reserved_rows_};
}

}  // namespace ivg
