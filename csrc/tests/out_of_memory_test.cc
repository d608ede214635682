// SPDX-License-Identifier: Apache-2.0
// Every allocation of the scheduler fails once: the call that it belongs to has changed nothing.
#include <doctest/doctest.h>

#include <cstdlib>
#include <new>
#include <set>

#include "driver.h"
#include "scheduler/errors.h"

using namespace ivg;
using namespace ivg::testing;

namespace {

thread_local bool is_armed = false;
thread_local int64_t num_allocations = 0;
thread_local int64_t fails_at = -1;

struct Armed {
  Armed() { is_armed = true; }
  ~Armed() { is_armed = false; }
};

}  // namespace

// This binary's allocator.
void* operator new(std::size_t size) {
  if (is_armed && num_allocations++ == fails_at) throw std::bad_alloc();
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return operator new(size);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using Digest = std::vector<double>;

double mixed(int64_t a, int64_t b, int64_t c) {
  return static_cast<double>(((a * 131 + b) * 137 + c) * 2654435761u % 97);
}

// A life of a scheduler in which every call that throws for want of memory is made again.
struct Life {
  Scheduler scheduler;
  int num_failures = 0;
  Digest digest{};

  template <class Call>
  auto again(const Call& call) {
    for (;;) {
      const SchedulerStats before = scheduler.stats();
      try {
        const Armed armed;
        return call();
      } catch (const std::bad_alloc&) {
        ++num_failures;
      }
      scheduler.check_integrity();
      const SchedulerStats after = scheduler.stats();  // plan() may have admitted somebody
      CHECK(before.num_requests_waiting + before.num_requests_running ==
            after.num_requests_waiting + after.num_requests_running);
    }
  }

  void add(RequestSpec spec, int i) {
    spec.guidance = i % 2;
    spec.dedup_finished = i % 3 == 0;
    spec.num_outputs = spec.pool_size();
    const int64_t id = again([&] { return scheduler.add_request(spec); });
    CHECK(id == i);
  }

  void burst(const std::set<int64_t>& aborted) {
    const BurstPlan& plan = *again([&] { return &scheduler.plan(); });
    scheduler.check_integrity();
    for (const int64_t id : aborted) again([&] { return scheduler.abort(id); });
    if (plan.sample_request.empty()) return;
    Samples samples(plan);
    for (size_t b = 0; b < plan.sample_request.size(); ++b) {
      const int64_t id = plan.request_ids[plan.sample_request[b]];
      if (mixed(id, plan.sample_candidate[b], plan.sample_position[b]) < 8) {
        samples.set(b, {1, Finish::kStopText});
      }
    }
    again([&] { scheduler.commit_tokens(samples.view()); });
    scheduler.check_integrity();
  }

  void score() {
    const ScorePlan& plan = *again([&] { return &scheduler.plan_scores(); });
    size_t row = 0;
    for (size_t i = 0; i < plan.request_ids.size(); ++i) {
      const int64_t id = plan.request_ids[i];
      std::vector<double> scores;
      for (int32_t k = 0; k < plan.num_rows[i]; ++k, ++row) {
        CHECK(plan.row_twin[row] <= static_cast<int32_t>(row));
        scores.push_back(mixed(id, plan.row_candidate[row], plan.row_length[row]));
      }
      const auto num_scores = static_cast<int32_t>(scores.size());
      again([&] { return scheduler.commit_scores(id, scores.data(), num_scores, nullptr, 0); });
      scheduler.check_integrity();
    }
  }

  void take(int num_requests) {
    for (int64_t id = 0; id < num_requests; ++id) {
      const auto decided = again([&] { return scheduler.take_decided(id); });
      digest.insert(digest.end(), decided.begin(), decided.end());
    }
    for (const int64_t id : again([&] { return scheduler.take_finished(); })) {
      const SearchResult result = again([&] { return scheduler.take_result(id); });
      digest.push_back(static_cast<double>(id));
      for (const Candidate& candidate : result.candidates) {
        digest.insert(digest.end(), {static_cast<double>(candidate.id), candidate.score,
                                     static_cast<double>(candidate.finish)});
        for (const TokenRecord& record : candidate.history()) digest.push_back(record.token);
      }
    }
  }

  void live() {
    const RequestSpec specs[] = {
        make_spec(2, 3, 5, 24, 20), make_spec(1, 1, 0, 20, 33), make_spec(1, 4, 0, 18, 5),
        make_spec(2, 2, 4, 9, 40),  make_spec(3, 2, 17, 40, 9), make_spec(1, 2, 3, 9, 1),
    };
    int num_requests = 0;
    for (int round = 0; round < 8 || scheduler.has_unfinished(); ++round) {
      REQUIRE(round < 200);
      if (num_requests < 6) {
        RequestSpec spec = specs[num_requests];
        spec.score_eos_on_truncation = spec.reads_eos = num_requests % 2 == 0;
        add(spec, num_requests++);
      }
      std::set<int64_t> aborted;
      if (round == 6) aborted = {3, 5};  // one in flight, one that waits
      burst(aborted);
      score();
      take(num_requests);
    }
    CHECK(scheduler.stats().num_blocks_used == 0);
    again([&] { return scheduler.has_unfinished(); });
  }
};

SchedulerConfig crowded() {
  SchedulerConfig config = make_config(60, 4, 2);
  config.max_num_rows = 12;
  config.max_prefill_tokens = 24;
  return config;
}

}  // namespace

TEST_CASE("every allocation fails once: nothing changes, and the call can be made again") {
  fails_at = -1;
  num_allocations = 0;
  Life undisturbed{Scheduler(crowded())};
  undisturbed.live();
  const int64_t total = num_allocations;
  int64_t num_failures = 0;
  for (int64_t k = 0;; ++k) {
    CAPTURE(k);
    fails_at = k;
    num_allocations = 0;
    Life life{Scheduler(crowded())};
    life.live();
    REQUIRE(life.digest == undisturbed.digest);
    if (num_allocations <= k) break;  // it had none so late
    num_failures += life.num_failures;
  }
  CHECK(total > 500);
  CHECK(num_failures > total * 9 / 10);  // std::stable_sort can do without its buffer
  fails_at = -1;
}

TEST_CASE("a fork that finds no memory has changed nothing") {
  std::vector<int32_t> child;
  for (int64_t k = 0; child.empty(); ++k) {
    BlockPool pool(4);
    const std::vector<int32_t> table{pool.allocate(), pool.allocate()};
    std::vector<BlockCopy> copies;
    fails_at = k;
    num_allocations = 0;
    try {
      const Armed armed;
      child = pool.fork(table, 20, &copies);
    } catch (const std::bad_alloc&) {
      CHECK(copies.empty());
      CHECK(pool.num_used() == 2);
      CHECK(pool.ref_count(table[0]) == 1);
    }
    pool.check_integrity();
    CHECK(k < 10);
  }
  fails_at = -1;
}
