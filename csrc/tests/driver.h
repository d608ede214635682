// SPDX-License-Identifier: Apache-2.0
// A device that draws what a test wants it to draw.
#pragma once

#include <functional>
#include <vector>

#include "scheduler/scheduler.h"

namespace ivg::testing {

struct Drawn {
  int32_t num_tokens;
  Finish finish = Finish::kNone;
};

// What the device hands back for a plan: token 1000 * candidate + response index, logprob -1,
// base_logprob -2 and reward 0.5 each.
struct Samples {
  explicit Samples(const BurstPlan& plan) : num_steps(plan.num_steps) {
    const size_t num_samples = plan.sample_request.size();
    logprobs.assign(num_steps * num_samples, -1.0f);
    base_logprobs.assign(num_steps * num_samples, -2.0f);
    rewards.assign(num_steps * num_samples, 0.5f);
    for (int32_t step = 0; step < num_steps; ++step) {
      for (size_t b = 0; b < num_samples; ++b) {
        tokens.push_back(1000 * plan.sample_candidate[b] + plan.sample_position[b] + step);
      }
    }
    num_tokens = plan.sample_steps;
    finish.assign(num_samples, 0);
    stop_index.assign(num_samples, -1);
  }

  void set(size_t b, Drawn drawn) {
    num_tokens[b] = drawn.num_tokens;
    finish[b] = static_cast<uint8_t>(drawn.finish);
  }

  CommittedTokens view() const {
    return {tokens.data(),     logprobs.data(),   base_logprobs.data(),
            rewards.data(),    num_tokens.data(), finish.data(),
            stop_index.data(), num_steps,         static_cast<int32_t>(num_tokens.size())};
  }

  int32_t num_steps;
  std::vector<int32_t> tokens, num_tokens, stop_index;
  std::vector<float> logprobs, base_logprobs, rewards;
  std::vector<uint8_t> finish;
};

// One burst in which nobody stops; the number of steps.
inline int32_t run_burst(Scheduler* scheduler) {
  const BurstPlan& plan = scheduler->plan();
  const int32_t num_steps = plan.num_steps;
  if (!plan.sample_request.empty()) scheduler->commit_tokens(Samples(plan).view());
  scheduler->check_integrity();
  return num_steps;
}

// Scores all that waits for a score: `score(request id, candidate id)`.
inline void run_scores(
    Scheduler* scheduler,
    const std::function<double(int64_t, int32_t)>& score = [](int64_t, int32_t) { return 0.0; }) {
  const ScorePlan plan = scheduler->plan_scores();
  size_t row = 0;
  for (size_t i = 0; i < plan.request_ids.size(); ++i) {
    std::vector<double> scores;
    for (int32_t k = 0; k < plan.num_rows[i]; ++k) {
      scores.push_back(score(plan.request_ids[i], plan.row_candidate[row++]));
    }
    scheduler->commit_scores(plan.request_ids[i], scores.data(), plan.num_rows[i], nullptr, 0);
    scheduler->check_integrity();
  }
}

inline SchedulerConfig make_config(int32_t num_blocks = 1000, int32_t max_burst_steps = 16,
                                   int32_t max_join_steps = -1) {
  SchedulerConfig config;
  config.num_blocks = num_blocks;
  config.max_burst_steps = max_burst_steps;
  config.max_join_steps = max_join_steps;
  return config;
}

inline RequestSpec make_spec(int32_t W, int32_t K, int32_t L, int32_t T, int32_t prompt_len = 20) {
  RequestSpec spec;
  spec.prompt_lens = {prompt_len};
  spec.beam_width = W;
  spec.num_candidates = K;
  spec.chunk_length = L;
  spec.max_tokens = T;
  spec.has_scorer = true;
  return spec;
}

}  // namespace ivg::testing
