// SPDX-License-Identifier: Apache-2.0
// Random requests on a pool that is as small as admission allows, looking for what must never be.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>

#include "driver.h"
#include "scheduler/errors.h"

using namespace ivg;
using namespace ivg::testing;

namespace {

int32_t pick(std::mt19937& rng, int32_t low, int32_t high) {
  return std::uniform_int_distribution<int32_t>(low, high)(rng);
}

RequestSpec random_spec(std::mt19937& rng) {
  RequestSpec spec =
      make_spec(pick(rng, 1, 4), pick(rng, 1, 4), pick(rng, 0, 1) ? pick(rng, 1, 40) : 0,
                pick(rng, 1, 90), pick(rng, 1, 70));
  spec.has_scorer = pick(rng, 0, 3) > 0;
  spec.dedup_finished = pick(rng, 0, 1);
  spec.num_outputs = pick(rng, 1, spec.pool_size());
  spec.guidance = pick(rng, 0, 2);
  spec.reads_eos = pick(rng, 0, 1);
  spec.score_eos_on_truncation = pick(rng, 0, 1);
  return spec;
}

// Mostly the full number of tokens: long responses press hardest on the pool.
Samples random_samples(const BurstPlan& plan, std::mt19937& rng, int32_t stop_percent) {
  Samples samples(plan);
  for (size_t b = 0; b < plan.sample_request.size(); ++b) {
    if (pick(rng, 0, 99) < stop_percent) {
      samples.set(b, {pick(rng, 1, plan.sample_steps[b]),
                      pick(rng, 0, 1) ? Finish::kStop : Finish::kStopText});
    }
  }
  return samples;
}

}  // namespace

TEST_CASE("a request never needs more blocks than admission reserved for it") {
  std::mt19937 rng(7);
  double tightest = 0;
  for (int trial = 0; trial < 400; ++trial) {
    CAPTURE(trial);
    const RequestSpec spec = random_spec(rng);
    // What add_request itself reserves: a chunk that no response outgrows is none.
    RequestSpec reserved = spec;
    if (spec.pool_size() == 1 || spec.chunk_length >= spec.max_tokens) reserved.chunk_length = 0;
    const auto worst = static_cast<int32_t>(reserved.worst_case_blocks());
    Scheduler scheduler(make_config(worst, pick(rng, 1, 16)));  // not one block to spare
    scheduler.add_request(spec);
    while (scheduler.has_unfinished()) {
      const BurstPlan& plan = scheduler.plan();
      CHECK(plan.copies.size() <= plan.sample_request.size());
      CHECK(plan.row_request.size() <= static_cast<size_t>(spec.pool_size()));
      scheduler.check_integrity();
      scheduler.commit_tokens(random_samples(plan, rng, trial % 3).view());
      scheduler.check_integrity();
      run_scores(&scheduler, [&](int64_t, int32_t) { return pick(rng, 0, 9); });
    }
    const SearchResult result = scheduler.take_result(0);
    REQUIRE(result.peak_blocks <= worst);
    tightest = std::max(tightest, static_cast<double>(result.peak_blocks) / worst);
    CHECK(scheduler.stats().num_blocks_used == 0);
  }
  CHECK(tightest > 0.9);  // the search did come close
}

TEST_CASE("many requests, aborts at any time: each ends once, nothing leaks") {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    std::mt19937 rng(seed);
    SchedulerConfig config = make_config(pick(rng, 60, 300), pick(rng, 1, 16), pick(rng, -1, 4));
    config.max_num_rows = pick(rng, 16, 48);
    Scheduler scheduler(config);
    std::map<int64_t, int> ends;
    std::vector<std::pair<int64_t, int32_t>> to_score;  // request, rows: scorers may be late
    int64_t num_added = 0;
    for (int round = 0; round < 120 || scheduler.has_unfinished(); ++round) {
      REQUIRE(round < 5000);
      const auto disturb = [&] {
        if (num_added > 0 && pick(rng, 0, 9) == 0) {
          scheduler.abort(pick(rng, 0, static_cast<int32_t>(num_added) - 1),
                          pick(rng, 0, 1) ? Finish::kAbort : Finish::kDeadline);
        }
        scheduler.check_integrity();
      };
      while (round < 100 && pick(rng, 0, 2) == 0) {
        try {
          scheduler.add_request(random_spec(rng));
          ++num_added;
        } catch (const CapacityExceeded&) {
        }
      }
      disturb();
      const BurstPlan& plan = scheduler.plan();
      CHECK(plan.sample_request.size() <= static_cast<size_t>(config.max_num_rows));
      disturb();
      for (auto it = to_score.begin(); it != to_score.end();) {
        if (round < 120 && pick(rng, 0, 1)) {
          ++it;
          continue;
        }
        std::vector<double> scores(it->second);
        for (double& score : scores) score = pick(rng, 0, 5);
        scheduler.commit_scores(it->first, scores.data(), it->second, nullptr, 0);
        it = to_score.erase(it);
        disturb();
      }
      if (!plan.sample_request.empty()) {
        scheduler.commit_tokens(random_samples(plan, rng, 5).view());
      }
      disturb();
      const ScorePlan& scores = scheduler.plan_scores();
      for (size_t i = 0; i < scores.request_ids.size(); ++i) {
        to_score.emplace_back(scores.request_ids[i], scores.num_rows[i]);
      }
      for (const int64_t id : scheduler.take_finished()) {
        ++ends[id];
        const SearchResult result = scheduler.take_result(id);
        CHECK(!result.candidates.empty());
        for (const Candidate& candidate : result.candidates) {
          CHECK(static_cast<int32_t>(candidate.history().size()) == candidate.length);
        }
      }
    }
    CHECK(static_cast<int64_t>(ends.size()) == num_added);
    for (const auto& [id, times] : ends) CHECK(times == 1);
    CHECK(scheduler.stats().num_blocks_used == 0);
    CHECK(scheduler.stats().num_rows == 0);
  }
}
