// SPDX-License-Identifier: Apache-2.0
// One request's beams: the candidates, their shared history, selection and fork.
//
// Chunk-level beam search CBS(W, K, L) (Weak-to-Strong Search, arXiv 2405.19262): W*K candidates
// sample up to L tokens, the whole pool is scored, its best W survive and are forked K times each.
// Best-of-N is CBS(1, N, none), plain sampling CBS(1, 1, none).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "scheduler/block_pool.h"

namespace ivg {

struct TokenRecord {
  int32_t token;
  float logprob;       // under the distribution that was sampled
  float base_logprob;  // under the base model at temperature 1
  float reward;        // implicit reward
};

// Tokens between two selections. Candidates of one ancestry share their past: a fork copies no
// history.
struct Segment {
  mutable std::shared_ptr<const Segment> parent;  // mutable for the destructor of a child alone
  std::vector<TokenRecord> records;
  uint64_t hash = 0;  // of all tokens up to here

  Segment() = default;
  Segment(std::shared_ptr<const Segment> parent, std::vector<TokenRecord> records);
  ~Segment();  // not recursive: a chain may be as long as the response
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  void fill(std::shared_ptr<const Segment> parent, std::vector<TokenRecord> records);
};

enum class Finish : uint8_t {
  kNone = 0,
  kStop = 1,      // the last token is a stop token
  kStopText = 2,  // the last token completes a stop string: no end-of-text token was sampled
  kLength = 3,
  kAbort = 4,
  kDeadline = 5,
};

// One hypothesis. `id` addresses its random numbers and breaks ties; it does not depend on batch or
// slot.
struct Candidate {
  int32_t id = 0;
  Finish finish = Finish::kNone;
  int32_t stop_index = -1;  // which stop string, opaque here
  int32_t length = 0;       // response tokens in past and recent together
  std::shared_ptr<const Segment> past;
  std::vector<TokenRecord> recent;  // since the last selection
  double reward = 0;                // sum of the records' rewards
  double score = 0;  // of the last boundary that this candidate or its ancestor reached
  bool is_scored = false;
  std::vector<int32_t> blocks;  // response blocks; the prompt's belong to the request

  bool is_finished() const { return finish != Finish::kNone; }
  int32_t last_token() const {
    return recent.empty() ? past->records.back().token : recent.back().token;
  }
  // All tokens of the response, oldest first.
  std::vector<TokenRecord> history() const;
  // Of all tokens of the response: equal for equal tokens.
  uint64_t hash() const;
  bool has_same_tokens(const Candidate& other) const;
};

struct RequestSpec {
  std::vector<int32_t> prompt_lens;  // tokens a role; 0: the role takes no part
  uint32_t step_roles = 1;     // bit r: role r forwards every sampled token (base and its guides)
  uint32_t settle_roles = 0;   // bit r: role r scores y_t before it has read it, so it reads the
                               // survivor's last token at the settle
  int32_t guidance = 0;        // requests of equal guidance are kept together in a batch
  int32_t beam_width = 1;      // W
  int32_t num_candidates = 1;  // K
  int32_t chunk_length = 0;    // L; 0: one chunk, i.e. best-of-N
  int32_t max_tokens = 1;      // T
  int32_t num_outputs = 1;     // n best of the last pool
  uint64_t seed = 0;
  bool has_scorer = false;
  bool dedup_finished = false;
  bool score_eos_on_truncation = false;
  bool reads_eos = false;  // the scorer also writes the end of text that it reads behind a response
  bool is_scored_late =
      false;  // others run on while it is scored, so nobody waits for its boundary
  int32_t max_burst_steps = 0;  // of the bursts it takes part in; 0: as the scheduler says

  // Slots that a row can need.
  int32_t max_length() const { return max_tokens + reads_eos; }
  int32_t pool_size() const { return beam_width * num_candidates; }
  int32_t longest_prompt() const;  // tokens, over the roles
  int32_t prompt_blocks() const;   // Bp
  // The most blocks that the request can ever hold at once.
  int64_t worst_case_blocks() const;
};

// The beams of one request. Between two selections `pool` holds the candidates by ascending id;
// between a selection and the fork `survivors` holds the best, by rank, and `pool` is empty.
class Search {
 public:
  Search(RequestSpec spec, BlockPool* blocks);
  ~Search() { release_all(); }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  const RequestSpec spec;
  std::vector<int32_t> prompt_table;
  std::vector<Candidate> pool;
  std::vector<Candidate> survivors;
  int32_t chunk_start = 0;  // response tokens at the last selection
  int32_t chunk_step = 0;   // tokens sampled since
  int32_t num_selections = 0;
  int32_t num_blocks_copied = 0;
  int32_t num_blocks_held = 0;
  int32_t peak_blocks = 0;

  int32_t length() const { return chunk_start + chunk_step; }
  // Steps to the next boundary if nobody finishes before.
  int32_t steps_to_boundary() const;
  bool is_at_boundary() const;

  // The prompt's blocks, and memory for the pool: its selections and its end need no more.
  void allocate_prompt();
  // All memory that the fork (if it is due) and `num_steps` more tokens of every candidate need:
  // up to the next fork nothing else takes any. A call that throws has changed nothing.
  void prepare(int32_t num_steps);
  // The first pool: W*K empty candidates.
  void branch_prompt();
  // The next pool: K children of each survivor, child c of rank r with id c*W + r. Losers were
  // freed before.
  void fork(std::vector<BlockCopy>* copies);
  // Makes room for `num_tokens` more tokens of a candidate.
  void reserve_tokens(Candidate* candidate, int32_t num_tokens);

  // Keeps the best W of the scored pool as survivors and frees the others; true if the search is
  // over: the pool is then its result, best first, clones reported once, at most `num_outputs`, and
  // what the end has left unfinished is kAbort.
  bool select();
  // Appends the tokens that have been decided since the last call: those that every candidate
  // shares, so that no selection can take them back. The last token of a finished candidate is left
  // for its result. Between two selections what has been compared once is not compared again.
  void take_decided(std::vector<int32_t>* tokens);
  // Ends the search here, whatever has been scored: every unfinished candidate gets `reason`.
  void finalize(Finish reason);

 private:
  void reserve_pool(int32_t num_candidates);
  void report();  // turns the pool into the result
  void move_in_order(std::vector<Candidate>* out);
  void release(Candidate* candidate);
  void drop(Candidate* candidate);  // a loser: its buffers go to the next children
  void release_all();

  BlockPool* blocks_;
  int32_t num_decided_ = 0;    // tokens taken
  bool has_diverged_ = false;  // nothing more can be decided before the next selection
  // Buffers of dropped candidates: W*K rows come and go at every fork, and the allocator of the C
  // library would take longer than all the rest.
  std::vector<std::vector<int32_t>> spare_tables_;
  std::vector<std::vector<TokenRecord>> spare_records_;
  std::vector<std::shared_ptr<Segment>> spare_segments_;
  std::vector<Candidate*> order_, kept_;  // of a selection
  std::vector<Candidate> moved_;
};

}  // namespace ivg
