// SPDX-License-Identifier: Apache-2.0
// Which rows run next, on which blocks: admission, cohorts, bursts.
//
// One round of the caller (the device loop) is
//
//   plan()           -> prompts to prefill, survivors to settle, the fork's copies, n steps for B
//   rows
//   ... the device runs them ...
//   commit_tokens()     what was sampled
//   plan_scores()    -> the candidates of every request that has reached its boundary
//   ... the scorers run ...
//   commit_scores()     per request: select, free the losers
//
// States of a request: waiting -> ready -> running -> (scoring ->) ready ... -> finished. `ready`
// means: at a boundary, the next plan() may start its chunk. Blocks move only inside plan(),
// commit_*() and abort(). Calls may come from several threads (an abort during a plan, say); the
// arrays of a plan are for the one thread that plans.
//
// A call that throws, for want of memory too, has changed nothing that shows and may be made again:
// all memory is taken before the first change. A request's end needs none.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler/block_pool.h"
#include "scheduler/search.h"

namespace ivg {

struct SchedulerConfig {
  int32_t num_blocks = 0;
  int32_t num_roles = 1;
  int32_t max_num_rows = 256;
  int32_t max_burst_steps = 16;
  int32_t max_join_steps = -1;       // -1: a newcomer always waits for its cohort's boundary
  int32_t max_queued_requests = -1;  // -1: no limit
  int32_t max_prefill_tokens = -1;   // prompt tokens of a plan, a role; -1: no limit
};

// What the device does next. Arrays stay valid until the next plan(). R rows are forwarded first
// (settled survivors and candidates that go on), then B samples are drawn, then num_steps - 1
// decode steps follow.
struct BurstPlan {
  int32_t num_steps = 0;  // 0: nothing to do
  int32_t table_width = 0;

  // Per request that takes part, by guidance, those that start from their prompt last.
  std::vector<int64_t> request_ids;
  std::vector<int32_t> prompt_blocks;  // Bp: where the response's blocks begin in a table
  std::vector<int32_t> num_samples;    // its samples are contiguous, in this order

  // Admitted requests whose prompts are read now, first come first served: every role of theirs
  // forwards its prompt's tokens [begin, end), as far as its prompt goes. Whose prompts have been
  // read to the end may start in the same plan.
  std::vector<int64_t> prefill_request_ids;
  std::vector<int32_t> prefill_begin;   // [P]
  std::vector<int32_t> prefill_end;     // [P]
  std::vector<int32_t> prefill_tables;  // [P, table_width]

  // Step 0. A row's token has response index `row_position` and is written to `row_slot`.
  std::vector<int32_t> row_request;  // [R] index into request_ids
  std::vector<int32_t> row_token;
  std::vector<int32_t> row_position;
  std::vector<int32_t> row_slot;
  std::vector<uint32_t> row_roles;  // bit r: role r forwards this row
  std::vector<int32_t> row_tables;  // [R, table_width]

  // Between step 0 and the first decode step.
  std::vector<BlockCopy> copies;

  // Samples, grouped by request, by ascending candidate id inside.
  std::vector<int32_t> sample_request;    // [B] index into request_ids
  std::vector<int32_t> sample_row;        // [B] logit row: index into the R rows; -1: the prompt's
  std::vector<int32_t> sample_candidate;  // [B] candidate id
  std::vector<int32_t> sample_position;   // [B] response index of the first token drawn
  std::vector<int32_t> sample_steps;      // [B] tokens to draw, <= num_steps; a pad row after that
  std::vector<int64_t> sample_seed;       // [B] the bits of the request's seed
  std::vector<int32_t> sample_slots;   // [num_steps, B] where the token of each step goes; -1: pad
  std::vector<int32_t> sample_tables;  // [B, table_width]

  void clear();
  // Room for so many more.
  void reserve(size_t num_requests, size_t num_rows, size_t num_samples);
};

// The candidates to score, grouped by request. Those that carry a score from an earlier boundary
// are left out.
struct ScorePlan {
  int32_t table_width = 0;
  int32_t max_new_tokens = 0;
  std::vector<int64_t> request_ids;
  std::vector<int32_t> num_rows;       // [Q]
  std::vector<int32_t> prompt_blocks;  // [Q]
  std::vector<int32_t> row_request;    // [S] index into request_ids
  std::vector<int32_t> row_candidate;  // [S] candidate id
  std::vector<int32_t> row_twin;       // [S] the request's first row that has the same tokens
  std::vector<int32_t> row_start;      // [S] response tokens at the last selection
  std::vector<int32_t> row_length;     // [S] response tokens now
  std::vector<uint8_t> row_finish;     // [S] Finish
  std::vector<uint8_t> row_adds_eos;   // [S] 1: score an end-of-text token behind the last one too
  std::vector<double> row_reward;      // [S] implicit reward in hand
  std::vector<int32_t> row_tokens;     // [S, max_new_tokens] tokens from row_start on; -1: none
  std::vector<int32_t> row_tables;     // [S, table_width]

  void clear();
};

struct CommittedTokens {       // one burst's samples; n = num_steps, B samples, as in the plan
  const int32_t* tokens;       // [n, B]
  const float* logprobs;       // [n, B]
  const float* base_logprobs;  // [n, B]
  const float* rewards;        // [n, B]
  const int32_t* num_tokens;   // [B] tokens that count, from the first on
  const uint8_t* finish;       // [B] kNone, kStop or kStopText; kLength is found here
  const int32_t* stop_index;   // [B]
  int32_t num_steps;
  int32_t num_samples;
};

struct SearchResult {
  std::vector<Candidate> candidates;  // best first
  int32_t num_selections = 0;
  int32_t num_blocks_copied = 0;
  int32_t peak_blocks = 0;
};

struct SchedulerStats {
  int32_t num_requests_waiting = 0;
  int32_t num_requests_running = 0;
  int32_t num_blocks = 0;
  int32_t num_blocks_used = 0;
  int32_t num_rows = 0;  // reserved by admitted requests
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);

  // Queues a request, first come first served. Throws InvalidParameter; CapacityExceeded if it
  // could never fit; QueueFull.
  int64_t add_request(RequestSpec spec);
  // Throws what add_request would, a full queue aside.
  void check_request(RequestSpec spec) const;
  // Ends a request now, or when the burst in flight is committed. Its result holds what there is.
  // False if the request has ended already. `reason`: kAbort or kDeadline.
  bool abort(int64_t request_id, Finish reason = Finish::kAbort);

  const BurstPlan& plan();
  void commit_tokens(const CommittedTokens& committed);
  // Ends all requests of the last plan, which could not be run to its commit: what their blocks
  // hold is not known. Their ids.
  std::vector<int64_t> give_up();
  const ScorePlan& plan_scores();
  // Scores of the request's rows of the score plan, in its order; finite. `rewards` (may be null):
  // [rows, max_new_tokens] implicit rewards of the new tokens where the scorer has measured them.
  // False if the request has ended meanwhile.
  bool commit_scores(int64_t request_id, const double* scores, int32_t num_scores,
                     const float* rewards, int32_t rewards_stride);

  // What a candidate of a live request's pool has committed, oldest first.
  std::vector<TokenRecord> history(int64_t request_id, int32_t candidate_id) const;

  // Tokens of a request that have been decided since the last call; none once it has ended, as its
  // result then tells the rest. See Search::take_decided.
  std::vector<int32_t> take_decided(int64_t request_id);

  // Requests that have ended since the last call, in the order in which they did.
  std::vector<int64_t> take_finished();
  // The result of an ended request, once.
  SearchResult take_result(int64_t request_id);

  bool has_unfinished() const;
  SchedulerStats stats() const;
  const SchedulerConfig& config() const { return config_; }
  // Throws IntegrityError unless every invariant holds. Cost: one pass over all tables.
  void check_integrity() const;

 private:
  enum class State : uint8_t { kWaiting, kReady, kRunning, kScoring, kEnded };
  struct Request {
    Request(int64_t id, RequestSpec spec, BlockPool* blocks)
        : id(id), search(std::move(spec), blocks) {}
    int64_t id;
    Search search;
    State state = State::kWaiting;
    int32_t num_prefilled = 0;   // of the longest prompt's tokens
    int32_t prefill_end = 0;     // the same when the plan at work has run
    int32_t num_waited = 0;      // steps that others have taken while it could have started
    bool is_handed_out = false;  // scoring: its rows were in a score plan
    bool is_in_flight = false;   // part of the plan that runs now
    Finish abort_reason = Finish::kNone;  // to be ended at the commit
  };

  void validate(const RequestSpec& spec) const;
  void check_fits(const RequestSpec& spec) const;
  void check_and_simplify(RequestSpec& spec) const;
  void check_given_out(int64_t request_id) const;
  void validate(const CommittedTokens& committed);
  Request* find_live(int64_t request_id) const;  // null if it has ended
  Request& find(int64_t request_id) const;
  int32_t table_width() const;
  void reserve_plan(const std::vector<Request*>& taking_part);
  void admit();
  bool may_start(const Request& request) const;
  int32_t burst_steps(const std::vector<Request*>& taking_part) const;
  void plan_prefill();
  void plan_request(Request* request);
  void find_twins(const Search& search, int32_t first_row);
  void write_table(const Search& search, const Candidate* candidate, int32_t width,
                   std::vector<int32_t>* tables) const;
  void append(Search* search, const CommittedTokens& committed, int32_t first_sample) const;
  void reach_boundary(Request* request);
  void finish(Request* request);

  mutable std::mutex mutex_;  // held by every public call
  SchedulerConfig config_;
  BlockPool blocks_;
  BurstPlan plan_;
  ScorePlan score_plan_;
  std::vector<std::pair<uint64_t, int32_t>> hashes_;  // of find_twins
  std::vector<int32_t> row_of_rank_;                  // of plan_request
  bool is_in_flight_ = false;
  int64_t next_id_ = 0;
  int64_t reserved_blocks_ = 0;
  int32_t reserved_rows_ = 0;
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;  // until the result is taken
  std::deque<Request*> waiting_;
  std::vector<Request*> running_;  // in order of admission
  std::vector<int64_t> finished_;
};

}  // namespace ivg
