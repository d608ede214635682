// SPDX-License-Identifier: Apache-2.0
// A call that throws changes nothing.
#include "scheduler/errors.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "driver.h"

using namespace ivg;
using namespace ivg::testing;

namespace {

bool operator==(const SchedulerStats& a, const SchedulerStats& b) {
  return a.num_requests_waiting == b.num_requests_waiting &&
         a.num_requests_running == b.num_requests_running &&
         a.num_blocks_used == b.num_blocks_used && a.num_rows == b.num_rows;
}

}  // namespace

TEST_CASE("a config that cannot be is refused") {
  const auto refuses = [](void (*change)(SchedulerConfig*), const char* parameter) {
    CAPTURE(parameter);
    SchedulerConfig config = make_config();
    change(&config);
    try {
      Scheduler scheduler(config);
      FAIL("accepted");
    } catch (const InvalidParameter& error) {
      CHECK(error.parameter == parameter);
      CHECK(std::string(error.what()).find(std::to_string(error.value)) != std::string::npos);
    }
  };
  refuses([](SchedulerConfig* c) { c->num_blocks = 0; }, "num_blocks");
  refuses([](SchedulerConfig* c) { c->num_blocks = kMaxBlocks + 1; }, "num_blocks");
  refuses([](SchedulerConfig* c) { c->num_roles = 0; }, "num_roles");
  refuses([](SchedulerConfig* c) { c->num_roles = 33; }, "num_roles");
  refuses([](SchedulerConfig* c) { c->max_num_rows = 0; }, "max_num_rows");
  refuses([](SchedulerConfig* c) { c->max_burst_steps = 0; }, "max_burst_steps");
  refuses([](SchedulerConfig* c) { c->max_join_steps = -2; }, "max_join_steps");
  refuses([](SchedulerConfig* c) { c->max_queued_requests = -2; }, "max_queued_requests");
}

TEST_CASE("a request that cannot be is refused") {
  SchedulerConfig config = make_config();
  config.num_roles = 2;
  Scheduler scheduler(config);
  const auto refuses = [&](void (*change)(RequestSpec*), const char* parameter) {
    CAPTURE(parameter);
    RequestSpec spec = make_spec(2, 2, 5, 50);
    spec.prompt_lens = {20, 20};
    change(&spec);
    try {
      scheduler.add_request(spec);
      FAIL("accepted");
    } catch (const InvalidParameter& error) {
      CHECK(error.parameter == parameter);
    }
    CHECK_FALSE(scheduler.has_unfinished());
  };
  refuses([](RequestSpec* s) { s->prompt_lens = {20}; }, "prompt_lens");
  refuses([](RequestSpec* s) { s->prompt_lens = {0, 20}; }, "prompt_lens");
  refuses([](RequestSpec* s) { s->prompt_lens = {20, -1}; }, "prompt_lens");
  refuses([](RequestSpec* s) { s->prompt_lens = {20, INT32_MAX}; }, "prompt_lens");
  refuses([](RequestSpec* s) { s->prompt_lens[1] = 0, s->settle_roles = 2; }, "prompt_lens");
  refuses([](RequestSpec* s) { s->step_roles = 2; }, "step_roles");
  refuses([](RequestSpec* s) { s->step_roles = 5; }, "step_roles");
  refuses([](RequestSpec* s) { s->settle_roles = 1u << 31; }, "settle_roles");
  refuses([](RequestSpec* s) { s->beam_width = 0; }, "beam_width");
  refuses([](RequestSpec* s) { s->num_candidates = 0; }, "num_candidates");
  refuses([](RequestSpec* s) { s->beam_width = s->num_candidates = 1 << 16; }, "num_candidates");
  refuses([](RequestSpec* s) { s->chunk_length = -1; }, "chunk_length");
  refuses([](RequestSpec* s) { s->max_tokens = 0; }, "max_tokens");
  refuses([](RequestSpec* s) { s->max_tokens = INT32_MAX; }, "max_tokens");
  refuses([](RequestSpec* s) { s->num_outputs = 0; }, "num_outputs");
  refuses([](RequestSpec* s) { s->num_outputs = 5; }, "num_outputs");
  refuses([](RequestSpec* s) { s->guidance = -1; }, "guidance");
  scheduler.check_integrity();
}

TEST_CASE("the queue has a limit") {
  SchedulerConfig config = make_config();
  config.max_queued_requests = 2;
  Scheduler scheduler(config);
  for (int i = 0; i < 2; ++i) scheduler.add_request(make_spec(1, 2, 5, 50));
  CHECK_THROWS_AS(scheduler.add_request(make_spec(1, 2, 5, 50)), QueueFull);
  run_burst(&scheduler);  // both are admitted
  CHECK(scheduler.add_request(make_spec(1, 2, 5, 50)) == 2);
}

TEST_CASE("calls out of order throw") {
  Scheduler scheduler(make_config(1000, 2));
  CHECK(scheduler.plan().num_steps == 0);
  CHECK(scheduler.plan_scores().request_ids.empty());
  CHECK_THROWS_AS(scheduler.commit_tokens(Samples(scheduler.plan()).view()), InvalidState);
  const int64_t id = scheduler.add_request(make_spec(1, 2, 4, 8));
  const double scores[] = {1, 2};
  CHECK_THROWS_AS(scheduler.commit_scores(id, scores, 2, nullptr, 0), InvalidState);
  const BurstPlan& plan = scheduler.plan();
  CHECK_THROWS_AS(scheduler.plan(), InvalidState);
  CHECK_THROWS_AS(scheduler.plan_scores(), InvalidState);
  CHECK_THROWS_AS(scheduler.commit_scores(id, scores, 2, nullptr, 0), InvalidState);
  CHECK(plan.num_steps == 2);  // still the plan that runs
  scheduler.commit_tokens(Samples(plan).view());
  run_burst(&scheduler);
  CHECK_THROWS_AS(scheduler.commit_scores(id, scores, 2, nullptr, 0), InvalidState);
  scheduler.plan_scores();
  CHECK(scheduler.plan_scores().request_ids.empty());  // handed out once
  CHECK(scheduler.commit_scores(id, scores, 2, nullptr, 0));
  for (const int64_t unknown : {int64_t{-1}, id + 1}) {
    CHECK_THROWS_AS(scheduler.commit_scores(unknown, scores, 2, nullptr, 0), InvalidParameter);
    CHECK_THROWS_AS(scheduler.abort(unknown), InvalidParameter);
    CHECK_THROWS_AS(scheduler.take_result(unknown), InvalidParameter);
  }
  CHECK_THROWS_AS(scheduler.abort(id, Finish::kStop), InvalidParameter);
  CHECK_THROWS_AS(scheduler.take_result(id), InvalidParameter);
  scheduler.check_integrity();
}

TEST_CASE("tokens that cannot be are refused, and the burst can still be committed") {
  Scheduler scheduler(make_config());
  scheduler.add_request(make_spec(1, 2, 4, 8));
  scheduler.add_request(make_spec(1, 2, 4, 2));
  const BurstPlan& plan = scheduler.plan();
  const Samples good(plan);
  const SchedulerStats before = scheduler.stats();
  const auto refuses = [&](void (*change)(Samples*), const char* parameter) {
    CAPTURE(parameter);
    Samples bad = good;
    change(&bad);
    try {
      scheduler.commit_tokens(bad.view());
      FAIL("accepted");
    } catch (const InvalidParameter& error) {
      CHECK(error.parameter == parameter);
    }
    CHECK(scheduler.stats() == before);
    scheduler.check_integrity();
  };
  refuses([](Samples* s) { s->num_tokens.pop_back(); }, "num_samples");
  refuses([](Samples* s) { s->num_steps = 5; }, "num_steps");
  refuses([](Samples* s) { s->num_steps = -1; }, "num_steps");
  refuses([](Samples* s) { s->num_steps = 3; }, "num_tokens");
  refuses([](Samples* s) { s->num_tokens[0] = 3; }, "num_tokens");
  refuses([](Samples* s) { s->num_tokens[0] = 5; }, "num_tokens");
  refuses([](Samples* s) { s->set(1, {0, Finish::kStop}); }, "num_tokens");
  refuses([](Samples* s) { s->set(3, {3, Finish::kStop}); }, "num_tokens");  // 2 are planned
  refuses([](Samples* s) { s->set(1, {4, Finish::kLength}); }, "finish");
  refuses([](Samples* s) { s->finish[3] = 255; }, "finish");
  refuses([](Samples* s) { s->tokens[3] = -1; }, "tokens");
  Samples samples = good;
  samples.tokens[2 * 4 + 3] = -1;  // behind the end of a pad row: nobody looks
  scheduler.commit_tokens(samples.view());
}

TEST_CASE("scores that cannot be are refused, and can still be given") {
  Scheduler scheduler(make_config());
  const int64_t id = scheduler.add_request(make_spec(1, 3, 4, 8));
  run_burst(&scheduler);
  scheduler.plan_scores();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<float> rewards(3 * 4, 0.0f);
  const SchedulerStats before = scheduler.stats();
  for (const auto& bad : std::vector<std::vector<double>>{
           {}, {1, 2}, {1, 2, 3, 4}, {1, 2, nan}, {infinity, 2, 3}, {1, -infinity, 3}}) {
    CHECK_THROWS_AS(
        scheduler.commit_scores(id, bad.data(), static_cast<int32_t>(bad.size()), nullptr, 0),
        InvalidParameter);
  }
  const double good[] = {1, 2, 3};
  CHECK_THROWS_AS(scheduler.commit_scores(id, good, 3, rewards.data(), 3), InvalidParameter);
  CHECK_THROWS_AS(scheduler.commit_scores(id, good, 3, rewards.data(), -4), InvalidParameter);
  CHECK(scheduler.stats() == before);
  scheduler.check_integrity();
  CHECK(scheduler.commit_scores(id, good, 3, rewards.data(), 4));
  CHECK_THROWS_AS(scheduler.commit_scores(id, good, 3, nullptr, 0), InvalidState);
}
