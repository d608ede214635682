// SPDX-License-Identifier: Apache-2.0
// What a stream may say: the tokens that no selection can take back.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>

#include "driver.h"
#include "scheduler/scheduler.h"

using namespace ivg;
using namespace ivg::testing;

namespace {

using Ints = std::vector<int32_t>;

// One burst in which candidate c draws `draw(c, position)`, then the scores.
template <class Draw, class Score>
void run_step(Scheduler* scheduler, const Draw& draw, const Score& score,
              const std::function<void(const BurstPlan&, Samples*)>& stop = nullptr) {
  const BurstPlan& plan = scheduler->plan();
  Samples samples(plan);
  const size_t num_samples = plan.sample_request.size();
  for (size_t b = 0; b < num_samples; ++b) {
    for (int32_t step = 0; step < plan.num_steps; ++step) {
      samples.tokens[step * num_samples + b] =
          draw(plan.sample_candidate[b], plan.sample_position[b] + step);
    }
  }
  if (stop) stop(plan, &samples);
  if (num_samples > 0) scheduler->commit_tokens(samples.view());
  scheduler->check_integrity();
  run_scores(scheduler, score);
}

double no_score(int64_t, int32_t) { return 0; }

Ints tokens_of(const std::vector<TokenRecord>& records) {
  Ints tokens;
  for (const TokenRecord& record : records) tokens.push_back(record.token);
  return tokens;
}

}  // namespace

TEST_CASE("a single candidate decides every token that it draws, its last one aside") {
  Scheduler scheduler(make_config(1000, 3));
  const int64_t id = scheduler.add_request(make_spec(1, 1, 0, 10));
  CHECK(scheduler.take_decided(id).empty());
  const auto draw = [](int32_t, int32_t position) { return position; };
  Ints decided;
  for (const Ints& expected : {Ints{0, 1, 2}, Ints{3, 4, 5}, Ints{6, 7, 8}}) {
    run_step(&scheduler, draw, no_score);
    CHECK(scheduler.take_decided(id) == expected);
    CHECK(scheduler.take_decided(id).empty());
  }
  run_step(&scheduler, draw, no_score);
  CHECK(scheduler.take_decided(id).empty());  // it has ended: its result tells the rest
  CHECK(scheduler.take_result(id).candidates[0].length == 10);
  CHECK_THROWS(scheduler.take_decided(id + 1));
}

TEST_CASE("the last token of a finished candidate waits for its score") {
  Scheduler scheduler(make_config(1000, 4));
  const int64_t id = scheduler.add_request(make_spec(1, 1, 0, 10));
  const BurstPlan& plan = scheduler.plan();
  Samples samples(plan);
  samples.set(0, {3, Finish::kStopText});
  scheduler.commit_tokens(samples.view());
  CHECK(scheduler.take_decided(id).size() == 2);
  CHECK(scheduler.take_decided(id).empty());
  run_scores(&scheduler);
  CHECK(scheduler.take_decided(id).empty());
}

TEST_CASE("what all candidates share is decided inside a chunk, the winner's chunk at W = 1") {
  Scheduler scheduler(make_config(1000, 2));
  const int64_t id = scheduler.add_request(make_spec(1, 3, 4, 12));
  // The children part at position 1 of the first chunk, and nowhere in the second.
  const auto draw = [](int32_t candidate, int32_t position) {
    return position == 1 ? 100 + candidate : position;
  };
  const auto prefers_two = [](int64_t, int32_t candidate) { return candidate == 2 ? 1.0 : 0.0; };
  run_step(&scheduler, draw, prefers_two);
  CHECK(scheduler.take_decided(id) == Ints{0});
  run_step(&scheduler, draw, prefers_two);
  CHECK(scheduler.take_decided(id) == Ints{102, 2, 3});
  run_step(&scheduler, draw, prefers_two);
  CHECK(scheduler.take_decided(id) == Ints{4, 5});
  run_step(&scheduler, draw, prefers_two);
  CHECK(scheduler.take_decided(id) == Ints{6, 7});
}

TEST_CASE("beams decide where they have a common ancestor, or have said the same by chance") {
  Scheduler scheduler(make_config());
  const int64_t id = scheduler.add_request(make_spec(2, 2, 2, 10));
  // Ids of the children: 0 and 2 of the best survivor, 1 and 3 of the other.
  const auto unlike = [](int32_t candidate, int32_t position) { return 10 * position + candidate; };
  const auto low = [](int64_t, int32_t candidate) { return -candidate; };
  const auto even = [](int64_t, int32_t candidate) { return candidate % 2 == 0 ? 1.0 : 0.0; };
  run_step(&scheduler, unlike, low);
  CHECK(scheduler.take_decided(id).empty());  // candidates 0 and 1 survive
  run_step(&scheduler, unlike, even);         // both survivors descend from candidate 0
  CHECK(scheduler.take_decided(id) == Ints{0, 10});
  const auto like = [](int32_t, int32_t position) { return 10 * position; };
  run_step(&scheduler, like, low);  // children 0 and 1, of unlike parents
  CHECK(scheduler.take_decided(id).empty());
  run_step(&scheduler, like, even);  // both of the better parent, and they say the same
  CHECK(scheduler.take_decided(id) == Ints{20, 30, 40, 50, 60, 70});
}

TEST_CASE("a finished beam holds back what goes on behind it") {
  Scheduler scheduler(make_config());
  const int64_t id = scheduler.add_request(make_spec(2, 2, 4, 12));
  const auto draw = [](int32_t, int32_t position) { return position; };
  const auto low = [](int64_t, int32_t candidate) { return -candidate; };
  run_step(&scheduler, draw, low,
           [](const BurstPlan&, Samples* samples) { samples->set(0, {3, Finish::kStop}); });
  CHECK(scheduler.take_decided(id) == Ints{0, 1});
  run_step(&scheduler, draw, low);  // it survives again
  CHECK(scheduler.take_decided(id).empty());
}

TEST_CASE("random requests: decided is the common prefix, and a prefix of every result") {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    std::mt19937 rng(seed);
    const auto pick = [&](int32_t low, int32_t high) {
      return std::uniform_int_distribution<int32_t>(low, high)(rng);
    };
    Scheduler scheduler(make_config(5000, pick(1, 8)));
    RequestSpec spec = make_spec(pick(1, 3), pick(1, 3), pick(1, 6), pick(5, 60));
    spec.dedup_finished = pick(0, 1);
    spec.num_outputs = spec.pool_size();
    const int64_t id = scheduler.add_request(spec);
    const int32_t num_words = pick(1, 3);
    Ints decided;
    while (scheduler.has_unfinished()) {
      run_step(
          &scheduler, [&](int32_t, int32_t) { return pick(1, num_words); },
          [&](int64_t, int32_t) { return pick(0, 9); },
          [&](const BurstPlan& plan, Samples* samples) {
            for (size_t b = 0; b < plan.sample_request.size(); ++b) {
              if (pick(0, 19) == 0) samples->set(b, {pick(1, plan.sample_steps[b]), Finish::kStop});
            }
          });
      const bool is_asked = pick(0, 2) > 0;  // not every step
      if (!is_asked) continue;
      const Ints more = scheduler.take_decided(id);
      decided.insert(decided.end(), more.begin(), more.end());
    }
    for (const Candidate& candidate : scheduler.take_result(id).candidates) {
      const Ints said = tokens_of(candidate.history());
      REQUIRE(decided.size() <= said.size());
      CHECK(std::equal(decided.begin(), decided.end(), said.begin()));
    }
  }
}

TEST_CASE("a random pool decides all that its candidates' own histories share") {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    std::mt19937 rng(seed);
    const auto pick = [&](int32_t low, int32_t high) {
      return std::uniform_int_distribution<int32_t>(low, high)(rng);
    };
    BlockPool blocks(2000);
    RequestSpec spec = make_spec(pick(1, 3), pick(1, 3), 3, 40);
    spec.dedup_finished = pick(0, 1);
    Search search(spec, &blocks);
    search.allocate_prompt();
    search.branch_prompt();
    Ints decided;
    const auto check = [&](const std::vector<Candidate>& alive) {
      search.take_decided(&decided);
      Ints shared = tokens_of(alive.front().history());
      for (const Candidate& candidate : alive) {
        Ints said = tokens_of(candidate.history());
        if (candidate.is_finished()) said.pop_back();
        const auto ends = std::mismatch(shared.begin(), shared.end(), said.begin(), said.end());
        shared.erase(ends.first, shared.end());
      }
      CHECK(decided == shared);
    };
    bool is_over = false;
    while (!is_over) {
      const int32_t num_words = pick(1, 2);
      const bool may_stop = pick(0, 1);
      while (!search.is_at_boundary()) {
        for (Candidate& candidate : search.pool) {
          if (candidate.is_finished()) continue;
          search.reserve_tokens(&candidate, 1);
          const int32_t word = pick(1, num_words);
          candidate.recent.push_back({word, 0, 0, 0});
          ++candidate.length;
          if (candidate.length == spec.max_tokens) candidate.finish = Finish::kLength;
          if (may_stop && pick(0, 9) == 0) {
            candidate.recent.back().token = 0;
            candidate.finish = Finish::kStop;
          }
        }
        ++search.chunk_step;
        if (pick(0, 1)) check(search.pool);
      }
      for (Candidate& candidate : search.pool) candidate.score = pick(0, 3);
      is_over = search.select();
      if (is_over) break;
      if (pick(0, 1)) check(search.survivors);
      std::vector<BlockCopy> copies;
      search.fork(&copies);
      if (pick(0, 1)) check(search.pool);
    }
  }
}
