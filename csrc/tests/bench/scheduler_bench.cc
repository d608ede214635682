// SPDX-License-Identifier: Apache-2.0
// C++ time between two chunks, without the Python binding: plan (with the fork) and commit_scores
// (the selection) for requests whose rows add up to 256, prompts of 1,024 tokens, responses of 256.
// `make bench-core` runs it. One line a shape: microseconds at the 20th, 50th and 80th percentile.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <vector>

#include "scheduler/scheduler.h"
#include "tests/driver.h"

namespace {

using namespace ivg;
using Clock = std::chrono::steady_clock;

struct Shape {
  int32_t num_requests, beam_width, num_candidates, chunk_length;
};

double microseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

// Appends the time of every chunk of one run but the first, which is a prefill.
void run(const Shape& shape, std::mt19937* rng, std::vector<double>* times) {
  SchedulerConfig config;
  config.num_blocks = 60'000;
  config.num_roles = 4;
  config.max_burst_steps = 64;
  Scheduler scheduler(config);
  RequestSpec spec = testing::make_spec(shape.beam_width, shape.num_candidates, shape.chunk_length,
                                        /*T=*/256, /*prompt_len=*/1024);
  spec.prompt_lens.assign(4, 1024);
  spec.step_roles = 0b0111;
  spec.settle_roles = 0b1000;
  for (int32_t i = 0; i < shape.num_requests; ++i) scheduler.add_request(spec);
  std::normal_distribution<double> score;
  bool is_first = true;
  while (scheduler.has_unfinished()) {
    auto begin = Clock::now();
    const BurstPlan& plan = scheduler.plan();
    double time = microseconds_since(begin);
    testing::Samples samples(plan);
    for (int32_t& token : samples.tokens) token = static_cast<int32_t>((*rng)() % 50'000);
    scheduler.commit_tokens(samples.view());
    const std::vector<int64_t> ids = scheduler.plan_scores().request_ids;
    std::vector<double> scores(spec.pool_size());
    for (const int64_t id : ids) {
      for (double& value : scores) value = score(*rng);
      begin = Clock::now();
      scheduler.commit_scores(id, scores.data(), spec.pool_size(), nullptr, 0);
      time += microseconds_since(begin);
    }
    if (!is_first) times->push_back(time);
    is_first = false;
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  for (const Shape& shape : {Shape{1, 16, 16, 16}, {4, 8, 8, 16}, {16, 4, 4, 5}, {64, 2, 2, 30}}) {
    std::vector<double> times;
    for (int i = 0; i < 20; ++i) run(shape, &rng, &times);
    std::sort(times.begin(), times.end());
    const auto percentile = [&](double p) {
      return times[static_cast<size_t>(p * static_cast<double>(times.size() - 1))];
    };
    std::printf("plan + select + fork, %2d requests of W %2d, K %2d, L %2d: %.1f [%.1f, %.1f] us\n",
                shape.num_requests, shape.beam_width, shape.num_candidates, shape.chunk_length,
                percentile(0.5), percentile(0.2), percentile(0.8));
  }
}
