// SPDX-License-Identifier: Apache-2.0
#include "scheduler/scheduler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "driver.h"
#include "scheduler/errors.h"

using namespace ivg;
using namespace ivg::testing;

namespace {

using Ints = std::vector<int32_t>;
using Ids = std::vector<int64_t>;

// Runs until nobody is left; the bursts' lengths.
Ints run_all(Scheduler* scheduler) {
  Ints bursts;
  while (scheduler->has_unfinished()) {
    bursts.push_back(run_burst(scheduler));
    run_scores(scheduler);
  }
  return bursts;
}

}  // namespace

TEST_CASE("bursts end at boundaries and are never longer than max_burst_steps") {
  for (int32_t max_burst_steps = 1; max_burst_steps <= 16; ++max_burst_steps) {
    for (const int32_t L : {0, 1, 5, 16, 30, 50, 70}) {
      CAPTURE(max_burst_steps);
      CAPTURE(L);
      const int32_t T = 50;
      Scheduler scheduler(make_config(1000, max_burst_steps));
      scheduler.add_request(make_spec(2, 2, L, T));
      Ints expected;
      for (int32_t n = 0; n < T;) {
        int32_t rest = L == 0 ? T - n : std::min(L, T - n);
        n += rest;
        for (; rest > 0; rest -= expected.back()) {
          expected.push_back(std::min(rest, max_burst_steps));
        }
      }
      CHECK(run_all(&scheduler) == expected);
    }
  }
}

TEST_CASE("a chunk forwards W + (L-1) * W * K rows, each sample to its own slot") {
  const int32_t W = 4, K = 4, L = 5, T = 50;
  Scheduler scheduler(make_config());
  RequestSpec spec = make_spec(W, K, L, T);
  spec.seed = ~uint64_t{0} - 1;
  scheduler.add_request(spec);
  for (int32_t chunk = 0; chunk < T / L; ++chunk) {
    CAPTURE(chunk);
    const BurstPlan& plan = scheduler.plan();
    CHECK(plan.num_steps == L);
    CHECK(plan.prefill_request_ids.size() == (chunk == 0));
    CHECK(plan.row_request.size() == (chunk == 0 ? 0 : W));
    REQUIRE(plan.sample_request.size() == W * K);
    CHECK(plan.copies.size() == (chunk * L % kBlockSize == 0 ? 0 : W * (K - 1)));
    Ints slots;
    for (int32_t b = 0; b < W * K; ++b) {
      CHECK(plan.sample_candidate[b] == b);
      CHECK(plan.sample_row[b] == (chunk == 0 ? -1 : b % W));
      CHECK(plan.sample_position[b] == chunk * L);
      CHECK(plan.sample_steps[b] == L);
      CHECK(static_cast<uint64_t>(plan.sample_seed[b]) == spec.seed);
      for (int32_t step = 0; step < L; ++step) {
        const int32_t t = chunk * L + step;
        const int32_t block =
            plan.sample_tables[b * plan.table_width + plan.prompt_blocks[0] + t / kBlockSize];
        CHECK(plan.sample_slots[step * W * K + b] == block * kBlockSize + t % kBlockSize);
        slots.push_back(plan.sample_slots[step * W * K + b]);
      }
    }
    std::sort(slots.begin(), slots.end());
    CHECK(std::unique(slots.begin(), slots.end()) == slots.end());
    scheduler.commit_tokens(Samples(plan).view());
    run_scores(&scheduler);
    scheduler.check_integrity();
  }
  CHECK_FALSE(scheduler.has_unfinished());
  const SearchResult result = scheduler.take_result(0);
  CHECK(result.num_selections == T / L);
  CHECK(result.candidates[0].reward == 0.5 * T);
}

TEST_CASE("rows say which roles forward them") {
  SchedulerConfig config = make_config(1000, 3);
  config.num_roles = 3;
  Scheduler scheduler(config);
  RequestSpec spec = make_spec(2, 2, 5, 20);
  spec.prompt_lens = {20, 3, 40};
  spec.step_roles = 1;
  spec.settle_roles = 4;
  scheduler.add_request(spec);
  run_burst(&scheduler);
  const BurstPlan& inside = scheduler.plan();  // inside a chunk: all candidates, step roles alone
  CHECK(inside.num_steps == 2);
  CHECK(inside.copies.empty());
  CHECK(inside.row_roles == std::vector<uint32_t>{1, 1, 1, 1});
  CHECK(inside.row_position == Ints{2, 2, 2, 2});
  CHECK(inside.row_token == Ints{2, 1002, 2002, 3002});
  CHECK(inside.sample_row == Ints{0, 1, 2, 3});
  scheduler.commit_tokens(Samples(inside).view());
  run_scores(&scheduler);
  const BurstPlan& settle = scheduler.plan();
  CHECK(settle.prompt_blocks == Ints{3});
  CHECK(settle.row_roles == std::vector<uint32_t>{5, 5});
  CHECK(settle.row_position == Ints{4, 4});
  CHECK(settle.row_token == Ints{4, 1004});
  CHECK(settle.sample_row == Ints{0, 1, 0, 1});
}

TEST_CASE("finished candidates leave the batch at the next burst, shorter requests are pads") {
  Scheduler scheduler(make_config(1000, 4));
  scheduler.add_request(make_spec(1, 3, 8, 40));
  scheduler.add_request(make_spec(1, 2, 8, 2, 50));
  const BurstPlan& first = scheduler.plan();
  CHECK(first.prompt_blocks == Ints{2, 4});
  for (int32_t b = 0; b < 5; ++b) {
    const int32_t* table = first.sample_tables.data() + b * first.table_width;
    const int32_t block = table[first.prompt_blocks[first.sample_request[b]]];
    CHECK(first.sample_slots[b] == block * kBlockSize);
  }
  CHECK(first.num_steps == 4);
  CHECK(first.sample_steps == Ints{4, 4, 4, 2, 2});
  for (int32_t step = 0; step < 4; ++step) {
    for (int32_t b = 0; b < 5; ++b) {
      CHECK((first.sample_slots[step * 5 + b] == -1) == (b >= 3 && step >= 2));
    }
  }
  Samples samples(first);
  samples.set(1, {2, Finish::kStop});
  scheduler.commit_tokens(samples.view());
  run_scores(&scheduler);
  const BurstPlan& second = scheduler.plan();
  CHECK(second.sample_candidate == Ints{0, 2});
  CHECK(second.sample_position == Ints{4, 4});
  CHECK(scheduler.take_finished() == Ids{1});
  CHECK(scheduler.take_result(1).candidates[0].finish == Finish::kLength);
}

TEST_CASE("prompts are read in pieces, first come first served, while others decode") {
  SchedulerConfig config = make_config(1000, 4);
  config.num_roles = 2;
  config.max_prefill_tokens = 10;
  Scheduler scheduler(config);
  const auto add = [&](int32_t base, int32_t guide) {
    RequestSpec spec = make_spec(1, 1, 0, 40);
    spec.prompt_lens = {base, guide};
    spec.step_roles = 0b11;
    return scheduler.add_request(spec);
  };
  const auto step = [&](const Ids& prefill, const Ints& begin, const Ints& end, const Ids& runs) {
    const BurstPlan& plan = scheduler.plan();
    CHECK(plan.prefill_request_ids == prefill);
    CHECK(plan.prefill_begin == begin);
    CHECK(plan.prefill_end == end);
    CHECK(plan.request_ids == runs);
    if (!plan.sample_request.empty()) scheduler.commit_tokens(Samples(plan).view());
    scheduler.check_integrity();
  };
  add(4, 6);
  add(25, 3);
  add(1, 2);
  step({0, 1}, {0, 0}, {6, 4}, {0});  // the longer of a request's prompts counts
  step({1}, {4}, {14}, {0});
  step({1}, {14}, {24}, {0});
  step({1, 2}, {24, 0}, {25, 2}, {0, 1, 2});
  step({}, {}, {}, {0, 1, 2});
  CHECK(add(30, 30) == 3);
  step({3}, {0}, {10}, {0, 1, 2});
  CHECK(scheduler.abort(3));  // half read
  step({}, {}, {}, {0, 1, 2});
  config.max_prefill_tokens = 0;
  CHECK_THROWS_AS(Scheduler{config}, InvalidParameter);
}

TEST_CASE("candidates that drew the same text are each other's twins, over their whole history") {
  Scheduler scheduler(make_config());
  scheduler.add_request(make_spec(2, 2, 2, 10));
  const auto draw = [&](const std::vector<int32_t>& tokens) {  // two of each candidate
    Samples samples(scheduler.plan());
    for (size_t b = 0; b < 4; ++b) {
      samples.tokens[b] = tokens[2 * b];
      samples.tokens[4 + b] = tokens[2 * b + 1];
    }
    scheduler.commit_tokens(samples.view());
    const ScorePlan& plan = scheduler.plan_scores();
    CHECK(plan.row_candidate == Ints{0, 1, 2, 3});
    return plan.row_twin;
  };
  const auto score = [&](const std::vector<double>& scores) {
    scheduler.commit_scores(0, scores.data(), 4, nullptr, 0);
  };
  CHECK(draw({1, 2, 2, 1, 1, 2, 1, 3}) == Ints{0, 1, 0, 3});
  score({4, 3, 2, 1});
  // Children 0 and 2 of (1, 2), 1 and 3 of (2, 1): equal chunks on unequal pasts are no twins.
  CHECK(draw({5, 6, 5, 6, 7, 7, 5, 6}) == Ints{0, 1, 2, 1});
  score({4, 1, 3, 2});
  // Children 0 and 2 of (1, 2, 5, 6), 1 and 3 of (1, 2, 7, 7).
  CHECK(draw({5, 5, 5, 5, 5, 5, 5, 5}) == Ints{0, 1, 0, 1});
  score({4, 1, 3, 2});
  // Both survivors are twins now: so are the cousins that draw alike.
  CHECK(draw({8, 9, 8, 9, 9, 8, 9, 8}) == Ints{0, 0, 2, 2});
}

TEST_CASE("a candidate cut by a stop text keeps its tokens up to the cut") {
  Scheduler scheduler(make_config());
  RequestSpec spec = make_spec(1, 2, 0, 10);
  spec.num_outputs = 2;
  scheduler.add_request(spec);
  Samples samples(scheduler.plan());
  samples.set(0, {3, Finish::kStopText});
  samples.set(1, {10, Finish::kStop});  // a stop token at the limit is a stop, not a cut
  samples.stop_index = {7, -1};
  scheduler.commit_tokens(samples.view());
  const ScorePlan& scores = scheduler.plan_scores();
  CHECK(scores.row_length == Ints{3, 10});
  CHECK(scores.row_adds_eos == std::vector<uint8_t>{1, 0});
  CHECK(scores.max_new_tokens == 10);
  CHECK(scores.row_tokens[2] == 2);
  CHECK(scores.row_tokens[3] == -1);
  CHECK(scores.row_reward == std::vector<double>{1.5, 5});
  const double values[] = {1, 2};
  const std::vector<float> rewards(20, 0.25f);
  CHECK(scheduler.commit_scores(0, values, 2, rewards.data(), 10));
  const SearchResult result = scheduler.take_result(0);
  CHECK(result.candidates[0].finish == Finish::kStop);
  CHECK(result.candidates[1].finish == Finish::kStopText);
  CHECK(result.candidates[1].stop_index == 7);
  CHECK(result.candidates[1].reward == 0.75);
  CHECK(result.candidates[0].history()[9].reward == 0.25f);
}

TEST_CASE("score_eos_on_truncation asks for it at the limit, and only there") {
  for (const bool asked : {false, true}) {
    Scheduler scheduler(make_config());
    RequestSpec spec = make_spec(1, 2, 3, 6);
    spec.score_eos_on_truncation = asked;
    scheduler.add_request(spec);
    run_burst(&scheduler);
    CHECK(scheduler.plan_scores().row_adds_eos == std::vector<uint8_t>{0, 0});
    const double values[] = {1, 2};
    scheduler.commit_scores(0, values, 2, nullptr, 0);
    run_burst(&scheduler);
    CHECK(scheduler.plan_scores().row_adds_eos == std::vector<uint8_t>{asked, asked});
  }
}

TEST_CASE("a scorer that reads the end of text has a slot for it, also behind a full block") {
  for (const bool reads : {false, true}) {
    Scheduler scheduler(make_config());
    RequestSpec spec = make_spec(1, 2, 0, 16);
    spec.score_eos_on_truncation = true;
    spec.reads_eos = reads;
    scheduler.add_request(spec);
    run_burst(&scheduler);
    CHECK(scheduler.stats().num_blocks_used == 2 + 2);
    const ScorePlan& plan = scheduler.plan_scores();
    scheduler.check_integrity();
    CHECK(scheduler.stats().num_blocks_used == 2 + (reads ? 4 : 2));
    CHECK(plan.table_width == 2 + (reads ? 2 : 1));
    if (reads) CHECK(plan.row_tables[3] != plan.row_tables[plan.table_width + 3]);
    const double values[] = {1, 2};
    scheduler.commit_scores(0, values, 2, nullptr, 0);
    scheduler.check_integrity();
    CHECK(scheduler.stats().num_blocks_used == 0);
  }
}

TEST_CASE("clones of a finished survivor are not scored again") {
  Scheduler scheduler(make_config());
  scheduler.add_request(make_spec(2, 2, 2, 6));
  Samples samples(scheduler.plan());
  samples.set(1, {1, Finish::kStop});
  scheduler.commit_tokens(samples.view());
  CHECK(scheduler.plan_scores().row_candidate == Ints{0, 1, 2, 3});
  const double first[] = {1, 5, 0, 0};
  scheduler.commit_scores(0, first, 4, nullptr, 0);
  const BurstPlan& plan = scheduler.plan();
  CHECK(plan.sample_candidate == Ints{1, 3});
  CHECK(plan.sample_row == Ints{0, 0});
  CHECK(plan.row_token == Ints{1});  // candidate 0's last: token 0 at response index 1
  scheduler.commit_tokens(Samples(plan).view());
  const ScorePlan& again = scheduler.plan_scores();
  CHECK(again.row_candidate == Ints{1, 3});
  CHECK(again.row_start == Ints{2, 2});
  CHECK(again.row_length == Ints{4, 4});
  const double second[] = {1, 2};
  CHECK(scheduler.commit_scores(0, second, 2, nullptr, 0));
  // Both clones outrank the others: the search is over.
  CHECK(scheduler.take_finished() == Ids{0});
  const SearchResult result = scheduler.take_result(0);
  CHECK(result.candidates[0].score == 5);
  CHECK(result.candidates[0].length == 1);
}

TEST_CASE("history of a live request's candidates") {
  Scheduler scheduler(make_config(1000, 2));
  const int64_t id = scheduler.add_request(make_spec(1, 2, 4, 8));
  CHECK_THROWS_AS(scheduler.history(id, 0), InvalidParameter);  // not branched yet
  run_burst(&scheduler);
  const auto tokens = [&](int32_t candidate_id) {
    Ints out;
    for (const TokenRecord& record : scheduler.history(id, candidate_id)) {
      out.push_back(record.token);
    }
    return out;
  };
  CHECK(tokens(1) == Ints{1000, 1001});
  CHECK_THROWS_AS(scheduler.history(id, 2), InvalidParameter);
  CHECK_THROWS_AS(scheduler.history(id + 1, 0), InvalidParameter);
  run_burst(&scheduler);
  run_scores(&scheduler, [](int64_t, int32_t candidate) { return candidate; });
  CHECK_THROWS_AS(scheduler.history(id, 0), InvalidParameter);  // selected, not forked yet
  const BurstPlan& plan = scheduler.plan();
  CHECK(tokens(0) == Ints{1000, 1001, 1002, 1003});  // in flight: what the fork has given it
  scheduler.commit_tokens(Samples(plan).view());
  CHECK(tokens(0) == Ints{1000, 1001, 1002, 1003, 4, 5});
}

TEST_CASE("without a scorer the boundary selects by itself, by candidate id") {
  Scheduler scheduler(make_config());
  RequestSpec spec = make_spec(1, 3, 0, 4);
  spec.has_scorer = false;
  spec.num_outputs = 3;
  scheduler.add_request(spec);
  run_burst(&scheduler);
  CHECK(scheduler.plan_scores().request_ids.empty());
  const SearchResult result = scheduler.take_result(0);
  for (int32_t i = 0; i < 3; ++i) CHECK(result.candidates[i].id == i);
}

TEST_CASE("a newcomer waits for its cohort's boundary, or starts at once if that is far") {
  // The cohort has L = 8 and bursts of 2; the newcomer arrives when 2 steps are done, 6 remain.
  for (int32_t max_join_steps = -1; max_join_steps <= 8; ++max_join_steps) {
    CAPTURE(max_join_steps);
    Scheduler scheduler(make_config(1000, 2, max_join_steps));
    scheduler.add_request(make_spec(1, 2, 8, 40));
    run_burst(&scheduler);
    const int64_t late = scheduler.add_request(make_spec(1, 2, 8, 40));
    const int64_t other = scheduler.add_request(make_spec(1, 2, 0, 40));  // no cohort: no wait
    for (int32_t done = 2; done < 8; done += 2) {
      const BurstPlan& plan = scheduler.plan();
      if (done == 2) CHECK(plan.prefill_request_ids == Ids{late, other});
      const auto& ids = plan.request_ids;
      const bool starts = std::count(ids.begin(), ids.end(), late) > 0;
      CAPTURE(done);
      CHECK(starts == (max_join_steps >= 0 && max_join_steps < 6));
      CHECK(std::count(ids.begin(), ids.end(), other) == 1);
      scheduler.commit_tokens(Samples(plan).view());
      run_scores(&scheduler);
      if (starts) break;
    }
    if (max_join_steps >= 0 && max_join_steps < 6) continue;
    const BurstPlan& plan = scheduler.plan();  // the boundary: both together
    CHECK(plan.request_ids.size() == 3);
    CHECK(plan.prefill_request_ids.empty());
    scheduler.commit_tokens(Samples(plan).view());
    scheduler.check_integrity();
  }
}

TEST_CASE("the wait for a request that ends inside its chunk counts the steps that it still has") {
  Scheduler scheduler(make_config(1000, 2, 3));
  scheduler.add_request(make_spec(1, 2, 8, 12));
  for (int i = 0; i < 4; ++i) run_burst(&scheduler);
  run_scores(&scheduler);
  run_burst(&scheduler);  // 10 of 12: two steps to its end, though six to the cohort's boundary
  const int64_t late = scheduler.add_request(make_spec(1, 2, 8, 12));
  CHECK(scheduler.plan().request_ids == Ids{0});
  CHECK(late == 1);
}

TEST_CASE("requests in a plan are grouped by guidance, those that start from the prompt last") {
  Scheduler scheduler(make_config(1000, 4));
  const auto add = [&](int32_t guidance) {
    RequestSpec spec = make_spec(1, 2, 0, 20);
    spec.guidance = guidance;
    return scheduler.add_request(spec);
  };
  add(2), add(0), add(2), add(1);
  run_burst(&scheduler);
  add(0);
  const BurstPlan& plan = scheduler.plan();
  CHECK(plan.request_ids == Ids{1, 4, 3, 0, 2});
  CHECK(plan.sample_row == Ints{0, 1, -1, -1, 2, 3, 4, 5, 6, 7});
}

TEST_CASE("admission is first come first served, by blocks and by rows") {
  const RequestSpec spec = make_spec(2, 2, 5, 20);  // 2 + 2 * 2 + 4 * 2 blocks, 4 rows
  REQUIRE(spec.worst_case_blocks() == 14);
  SUBCASE("blocks") {
    Scheduler scheduler(make_config(28));
    for (int i = 0; i < 3; ++i) scheduler.add_request(spec);
    const int64_t small = scheduler.add_request(make_spec(1, 1, 0, 1, 1));
    const BurstPlan& plan = scheduler.plan();
    CHECK(plan.prefill_request_ids == Ids{0, 1});
    CHECK(scheduler.stats().num_requests_waiting == 2);
    CHECK(scheduler.stats().num_rows == 8);
    CHECK(scheduler.abort(2));
    scheduler.commit_tokens(Samples(plan).view());
    run_all(&scheduler);
    CHECK(scheduler.take_finished() == Ids{2, 0, 1, small});
  }
  SUBCASE("rows") {
    SchedulerConfig config = make_config();
    config.max_num_rows = 9;
    Scheduler scheduler(config);
    for (int i = 0; i < 3; ++i) scheduler.add_request(spec);
    CHECK(scheduler.plan().prefill_request_ids == Ids{0, 1});
  }
}

TEST_CASE("what could never fit is refused, what just fits is served") {
  const RequestSpec spec = make_spec(2, 2, 5, 20);
  Scheduler small(make_config(13));
  CHECK_THROWS_AS(small.add_request(spec), CapacityExceeded);
  Scheduler fits(make_config(14));
  fits.add_request(spec);
  run_all(&fits);
  SchedulerConfig config = make_config();
  config.max_num_rows = 3;
  Scheduler narrow(config);
  CHECK_THROWS_AS(narrow.add_request(spec), CapacityExceeded);
  // A chunk that no response outgrows, and chunks of a single candidate, need no room for forks.
  Scheduler tiny(make_config(2 + 2));
  tiny.add_request(make_spec(1, 2, 1000, 16));
  tiny.add_request(make_spec(1, 1, 5, 32));
  CHECK(run_all(&tiny) == Ints{16, 16, 16});
}

TEST_CASE("abort in every state") {
  Scheduler scheduler(make_config(1000, 2));
  const int64_t a = scheduler.add_request(make_spec(2, 2, 4, 40));
  const auto expect_ended = [&](int64_t id, Finish reason, int32_t length, size_t num_used) {
    CHECK(scheduler.take_finished() == Ids{id});
    const SearchResult result = scheduler.take_result(id);
    REQUIRE(result.candidates.size() == 1);
    CHECK(result.candidates[0].finish == reason);
    CHECK(result.candidates[0].length == length);
    CHECK(scheduler.stats().num_blocks_used == static_cast<int32_t>(num_used));
    CHECK_FALSE(scheduler.abort(id));  // it has ended
    CHECK_THROWS_AS(scheduler.take_result(id), InvalidParameter);
    scheduler.check_integrity();
  };
  SUBCASE("waiting") {
    CHECK(scheduler.abort(a, Finish::kDeadline));
    expect_ended(a, Finish::kDeadline, 0, 0);
  }
  SUBCASE("admitted, not started") {
    run_burst(&scheduler);
    const int64_t b = scheduler.add_request(make_spec(1, 2, 4, 40, 50));
    run_burst(&scheduler);
    const int32_t used = scheduler.stats().num_blocks_used;
    CHECK(scheduler.abort(b));
    expect_ended(b, Finish::kAbort, 0, used - 4);
  }
  SUBCASE("in flight: at the commit, with what was drawn before or fewer") {
    const BurstPlan& plan = scheduler.plan();
    const int32_t used = scheduler.stats().num_blocks_used;
    CHECK(scheduler.abort(a));
    CHECK(scheduler.abort(a, Finish::kDeadline));  // the first reason stands
    CHECK(scheduler.take_finished().empty());
    CHECK(scheduler.stats().num_blocks_used == used);
    Samples samples(plan);
    for (size_t b = 0; b < 4; ++b) samples.set(b, {b == 0 ? 1 : 0});
    scheduler.commit_tokens(samples.view());
    expect_ended(a, Finish::kAbort, 1, 0);
  }
  SUBCASE("in flight, no step was run at all") {
    const BurstPlan& plan = scheduler.plan();
    CHECK(scheduler.abort(a));
    Samples samples(plan);
    samples.num_steps = 0;
    for (size_t b = 0; b < 4; ++b) samples.set(b, {0});
    scheduler.commit_tokens(samples.view());
    expect_ended(a, Finish::kAbort, 0, 0);
  }
  SUBCASE("between two bursts of a chunk") {
    run_burst(&scheduler);
    CHECK(scheduler.abort(a));
    expect_ended(a, Finish::kAbort, 2, 0);
  }
  SUBCASE("before and after its rows were handed to the scorer") {
    for (int i = 0; i < 2; ++i) run_burst(&scheduler);
    SUBCASE("after") { CHECK(scheduler.plan_scores().request_ids == Ids{a}); }
    SUBCASE("before") {}
    CHECK(scheduler.abort(a));
    CHECK(scheduler.plan_scores().request_ids.empty());
    const double scores[] = {1, 2, 3, 4};
    CHECK_FALSE(scheduler.commit_scores(a, scores, 4, nullptr, 0));
    expect_ended(a, Finish::kAbort, 4, 0);
  }
  SUBCASE("selected, not forked: the best survivor") {
    for (int i = 0; i < 2; ++i) run_burst(&scheduler);
    run_scores(&scheduler, [](int64_t, int32_t candidate) { return candidate; });
    CHECK(scheduler.abort(a));
    CHECK(scheduler.take_result(a).candidates[0].id == 3);
    CHECK(scheduler.stats().num_blocks_used == 0);
  }
  SUBCASE("others go on unharmed") {
    const int64_t b = scheduler.add_request(make_spec(2, 2, 4, 40));
    run_burst(&scheduler);
    const BurstPlan& plan = scheduler.plan();
    scheduler.abort(a);
    scheduler.commit_tokens(Samples(plan).view());
    scheduler.check_integrity();
    run_all(&scheduler);
    CHECK(scheduler.take_finished() == Ids{a, b});
    CHECK(scheduler.take_result(b).candidates[0].length == 40);
  }
}
