// SPDX-License-Identifier: Apache-2.0
// What the scheduler allows from several threads at once; the thread sanitizer watches these cases.
#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "driver.h"
#include "scheduler/errors.h"

using namespace ivg;
using namespace ivg::testing;

TEST_CASE("one thread steps while others add, abort, read and take") {
  constexpr int kNumRequests = 200;
  SchedulerConfig config = make_config(600, 4, 3);
  config.max_prefill_tokens = 30;
  config.max_queued_requests = 20;
  Scheduler scheduler(config);
  std::atomic<bool> is_done{false};
  std::atomic<int64_t> num_added{0};
  const auto until_done = [&](uint32_t seed, const std::function<void(int64_t)>& call) {
    return std::thread([&, seed, call] {
      std::mt19937 rng(seed);
      while (!is_done) {
        const int64_t n = num_added;
        if (n > 0) call(std::uniform_int_distribution<int64_t>(0, n - 1)(rng));
        std::this_thread::yield();
      }
    });
  };
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    for (int i = 0; i < kNumRequests;) {
      RequestSpec spec = make_spec(1 + i % 2, 1 + i % 3, i % 4 ? 5 : 0, 1 + i % 23, 1 + i % 50);
      spec.is_scored_late = i % 5 == 0;
      try {
        scheduler.add_request(spec);
        num_added = ++i;
      } catch (const QueueFull&) {
        std::this_thread::yield();
      }
    }
    is_done = true;
  });
  threads.push_back(until_done(1, [&](int64_t id) {
    if (id % 3 == 0) scheduler.abort(id, id % 2 ? Finish::kAbort : Finish::kDeadline);
  }));
  threads.push_back(until_done(2, [&](int64_t id) {
    scheduler.take_decided(id);
    try {
      scheduler.history(id, 0);
    } catch (const InvalidParameter&) {  // it has ended, or has no candidate yet
    }
  }));
  threads.push_back(until_done(3, [&](int64_t) {
    const SchedulerStats stats = scheduler.stats();
    REQUIRE(stats.num_blocks_used <= stats.num_blocks);
    scheduler.check_request(make_spec(2, 2, 5, 9));
    scheduler.has_unfinished();
    scheduler.check_integrity();
  }));

  std::map<int64_t, int> ends;
  const auto take = [&] {
    for (const int64_t id : scheduler.take_finished()) {
      ++ends[id];
      CHECK_FALSE(scheduler.take_result(id).candidates.empty());
    }
  };
  std::vector<std::pair<int64_t, int32_t>> late;
  for (int round = 0; !is_done || scheduler.has_unfinished(); ++round) {
    const BurstPlan& plan = scheduler.plan();
    if (!plan.sample_request.empty()) scheduler.commit_tokens(Samples(plan).view());
    const ScorePlan& scores = scheduler.plan_scores();
    for (size_t i = 0; i < scores.request_ids.size(); ++i) {
      late.emplace_back(scores.request_ids[i], scores.num_rows[i]);
    }
    for (size_t i = round % 2; i < late.size(); i += 1 + round % 2) {
      auto& [id, num_rows] = late[i];
      const std::vector<double> given(num_rows, 0.0);
      if (num_rows > 0) scheduler.commit_scores(id, given.data(), num_rows, nullptr, 0);
      num_rows = 0;
    }
    take();
  }
  for (std::thread& thread : threads) thread.join();
  take();
  CHECK(ends.size() == kNumRequests);
  for (const auto& [id, times] : ends) CHECK(times == 1);
  CHECK(scheduler.stats().num_blocks_used == 0);
  scheduler.check_integrity();
}

// The control of the run under the thread sanitizer, which must fail it: see the Makefile.
TEST_CASE("planted race" * doctest::skip()) {
  int count = 0;
  std::thread other([&] { ++count; });
  ++count;
  other.join();
  CHECK(count > 0);
}
