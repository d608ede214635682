// SPDX-License-Identifier: Apache-2.0
// Who starts when: the queue, cohorts, and requests whose scores come late.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>

#include "driver.h"
#include "scheduler/scheduler.h"

using namespace ivg;
using namespace ivg::testing;

namespace {

using Ids = std::vector<int64_t>;

RequestSpec late_spec(int32_t L, int32_t T) {
  RequestSpec spec = make_spec(2, 2, L, T);
  spec.is_scored_late = true;
  return spec;
}

void score_now(Scheduler* scheduler, int64_t id, size_t num_rows) {
  const std::vector<double> scores(num_rows, 0.0);
  scheduler->commit_scores(id, scores.data(), static_cast<int32_t>(num_rows), nullptr, 0);
}

// Who takes part in the next burst, which runs.
Ids burst(Scheduler* scheduler) {
  const BurstPlan& plan = scheduler->plan();
  const Ids ids = plan.request_ids;
  if (!ids.empty()) scheduler->commit_tokens(Samples(plan).view());
  scheduler->check_integrity();
  return ids;
}

}  // namespace

TEST_CASE("late scores: two of one chunk length run side by side, not by turns") {
  Scheduler scheduler(make_config(1000, 16));
  const int64_t a = scheduler.add_request(late_spec(4, 40));
  const int64_t b = scheduler.add_request(late_spec(4, 40));
  CHECK(burst(&scheduler) == Ids{a, b});
  CHECK(scheduler.plan_scores().request_ids == Ids{a, b});
  score_now(&scheduler, a, 4);
  // b's scores come while a is inside its chunk.
  const BurstPlan& alone = scheduler.plan();
  CHECK(alone.request_ids == Ids{a});
  Samples samples(alone);
  score_now(&scheduler, b, 4);
  scheduler.commit_tokens(samples.view());
  CHECK(scheduler.plan_scores().request_ids == Ids{a});
  for (int i = 0; i < 3; ++i) {  // scores come before the next look of the host
    score_now(&scheduler, a, 4);
    CHECK(burst(&scheduler) == Ids{a, b});
    CHECK(scheduler.plan_scores().request_ids == Ids{a, b});
    score_now(&scheduler, b, 4);
  }
}

TEST_CASE("late scores in the middle of the other's chunk do not wait for its boundary") {
  Scheduler scheduler(make_config(1000, 2));
  const int64_t a = scheduler.add_request(late_spec(6, 40));
  const int64_t b = scheduler.add_request(late_spec(6, 40));
  for (int i = 0; i < 3; ++i) CHECK(burst(&scheduler) == Ids{a, b});
  scheduler.plan_scores();
  score_now(&scheduler, a, 4);
  CHECK(burst(&scheduler) == Ids{a});
  score_now(&scheduler, b, 4);
  CHECK(burst(&scheduler) == Ids{a, b});
}

TEST_CASE("late scores: the request rejoins a cohort that is scored in time, at its boundary") {
  Scheduler scheduler(make_config(1000, 2));
  const int64_t late = scheduler.add_request(late_spec(4, 400));
  const int64_t first = scheduler.add_request(make_spec(2, 2, 4, 400));
  const int64_t second = scheduler.add_request(make_spec(2, 2, 4, 400));
  const auto score_in_time = [&] {
    for (const int64_t id : Ids(scheduler.plan_scores().request_ids)) {
      if (id != late) score_now(&scheduler, id, 4);
    }
  };
  for (int round = 0; round < 5; ++round) {
    CAPTURE(round);
    for (int i = 0; i < 2; ++i) {  // a chunk with all
      CHECK(burst(&scheduler).size() == 3);
      score_in_time();
    }
    CHECK(burst(&scheduler) == Ids{first, second});
    score_now(&scheduler, late, 4);  // in the middle of theirs
    CHECK(burst(&scheduler) == Ids{first, second});
    score_in_time();
  }
}

TEST_CASE("a newcomer starts after max_join_steps at the latest, whoever has a boundary when") {
  for (uint32_t seed = 0; seed < 80; ++seed) {
    CAPTURE(seed);
    std::mt19937 rng(seed);
    const auto pick = [&](int32_t low, int32_t high) {
      return std::uniform_int_distribution<int32_t>(low, high)(rng);
    };
    const int32_t max_join_steps = pick(0, 6);
    const int32_t max_burst_steps = pick(1, 5);
    Scheduler scheduler(make_config(4000, max_burst_steps, max_join_steps));
    std::map<int64_t, int32_t> steps_waited;  // of those that have not drawn a token
    int32_t longest = 0;
    for (int round = 0; round < 200 || scheduler.has_unfinished(); ++round) {
      REQUIRE(round < 3000);
      if (round < 200 && pick(0, 2) == 0) {
        steps_waited[scheduler.add_request(make_spec(1, 2, 9, pick(10, 60)))] = 0;
      }
      const BurstPlan& plan = scheduler.plan();
      for (const int64_t id : plan.request_ids) steps_waited.erase(id);
      for (auto& [id, steps] : steps_waited) {
        steps += plan.num_steps;
        longest = std::max(longest, steps);
      }
      if (!plan.sample_request.empty()) scheduler.commit_tokens(Samples(plan).view());
      run_scores(&scheduler);
    }
    // It is looked at before each burst: one that ends behind the bound has begun before it.
    CHECK(longest <= max_join_steps);
    CHECK(steps_waited.empty());
  }
}

TEST_CASE("first come, first served: a large request is not overtaken by small ones") {
  SchedulerConfig config = make_config(4000, 4);
  config.max_num_rows = 8;
  Scheduler scheduler(config);
  scheduler.add_request(make_spec(1, 2, 0, 30));
  const int64_t large = scheduler.add_request(make_spec(2, 4, 5, 10));
  Ids started;
  for (int round = 0; round < 200; ++round) {
    scheduler.add_request(make_spec(1, 1, 0, 2));  // there is always a small one
    for (const int64_t id : burst(&scheduler)) {
      if (std::find(started.begin(), started.end(), id) == started.end()) started.push_back(id);
    }
    run_scores(&scheduler);
  }
  CHECK(std::is_sorted(started.begin(), started.end()));
  CHECK(started.size() > 100);
  CHECK(started[1] == large);
}

TEST_CASE("a burst is no longer than any of those that take part wants") {
  Scheduler scheduler(make_config(1000, 16));
  RequestSpec streamed = make_spec(1, 1, 0, 6);
  streamed.max_burst_steps = 4;
  const int64_t id = scheduler.add_request(streamed);
  scheduler.add_request(make_spec(1, 1, 0, 40));
  CHECK(run_burst(&scheduler) == 4);
  CHECK(scheduler.take_decided(id).size() == 4);
  CHECK(run_burst(&scheduler) == 4);  // to its end: a pad from its sixth token on
  run_scores(&scheduler);
  CHECK(run_burst(&scheduler) == 16);
  streamed.max_burst_steps = -1;
  CHECK_THROWS(scheduler.add_request(streamed));
}
