// SPDX-License-Identifier: Apache-2.0
#include "scheduler/work_list.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/block_pool.h"
#include "scheduler/errors.h"

using namespace ivg;

namespace {

struct Batch {
  int64_t width = 0, num_tokens = 0;
  std::vector<int32_t> table, starts{0}, prompt_lens, response_lens, response_start;

  // Rows come after one another; `table_row` may be shorter than the width.
  void add(std::vector<int32_t> table_row, int32_t prompt, int32_t start, int32_t response,
           int32_t queries) {
    table_row.resize(width, -1);
    table.insert(table.end(), table_row.begin(), table_row.end());
    prompt_lens.push_back(prompt);
    response_start.push_back(start);
    response_lens.push_back(response);
    starts.push_back(starts.back() + queries);
    num_tokens = starts.back();
  }
  AttentionRows view() const {
    return {table.data(),
            starts.data(),
            prompt_lens.data(),
            response_lens.data(),
            response_start.data(),
            static_cast<int64_t>(prompt_lens.size()),
            width,
            num_tokens};
  }
  // Block id of the row's key block j.
  int32_t block(int64_t row, int64_t j) const {
    const int64_t prompt_blocks = blocks_for(prompt_lens[row]);
    const int64_t column = j < prompt_blocks ? j : response_start[row] + j - prompt_blocks;
    return table[row * width + column];
  }
};

struct Built {
  std::vector<WorkItem> items;
  std::vector<int32_t> token_rows, partial_starts;
  WorkList list{};

  Built(const Batch& batch, const WorkListOptions& options, int64_t max_items = 5000)
      : items(max_items, WorkItem{7, 7, 7, 7, 7, 7}),
        token_rows(batch.num_tokens, -1),
        partial_starts(batch.num_tokens + 1, -1) {
    list.items = items.data();
    list.token_rows = token_rows.data();
    list.partial_starts = partial_starts.data();
    list.max_items = max_items;
    list.max_partials = 100000;
    build_work_list(batch.view(), options, &list);
  }
};

// What a token reads: by split, its (row's table) block ids.
using Reads = std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>>;

Reads reads_of(const Batch& batch, const Built& built) {
  Reads reads;
  for (const WorkItem& item : built.items) {
    for (int32_t t = item.first_token; t < item.first_token + item.num_tokens; ++t) {
      const int32_t* starts = built.partial_starts.data() + t;
      if (starts[0] + item.split >= starts[1]) continue;  // as the kernel does
      auto& blocks = reads[{t, item.split}];
      CHECK(blocks.empty());  // nothing is read twice
      for (int32_t j = item.first_block; j < item.end_block; ++j) {
        blocks.push_back(batch.block(item.row, j));
      }
    }
  }
  return reads;
}

Batch random_batch(std::mt19937* rng) {
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int32_t>(low, high)(*rng);
  };
  Batch batch;
  batch.width = 24;
  int32_t next_block = 0;
  const int num_requests = draw(1, 3);
  for (int request = 0; request < num_requests; ++request) {
    const int32_t prompt = draw(0, 3) ? draw(1, 150) : 16 * draw(0, 5);
    const int32_t start = static_cast<int32_t>(blocks_for(prompt)) + draw(0, 1);
    std::vector<int32_t> common;
    for (int32_t j = 0; j < start; ++j) common.push_back(next_block++);
    const int32_t shared_response = draw(0, 2);
    for (int32_t j = 0; j < shared_response; ++j) common.push_back(next_block++);
    const int num_rows = draw(1, 5);
    for (int row = 0; row < num_rows; ++row) {
      std::vector<int32_t> table = common;
      const int32_t response = 16 * shared_response + draw(prompt ? 0 : 1, 60);
      while (static_cast<int64_t>(table.size()) < start + blocks_for(response)) {
        table.push_back(next_block++);
      }
      batch.add(table, prompt, start, response,
                std::min(prompt + response, draw(0, 1) ? 1 : draw(0, 30)));
    }
  }
  batch.num_tokens += draw(0, 2);  // pads
  return batch;
}

}  // namespace

TEST_CASE("every query reads its keys once, whoever shares them") {
  std::mt19937 rng(1);
  bool has_shared = false;
  for (int round = 0; round < 400; ++round) {
    const Batch batch = random_batch(&rng);
    WorkListOptions options;
    options.tile_tokens = 1 + static_cast<int32_t>(rng() % 9);
    options.run_blocks = 1 + static_cast<int32_t>(rng() % 6);
    options.min_shared_tokens = 1 + static_cast<int32_t>(rng() % 50);
    options.min_shared_rows = 1 + static_cast<int32_t>(rng() % 3);
    const Built built(batch, options);
    const Reads reads = reads_of(batch, built);
    int64_t num_partials = 0;
    for (int32_t t = 0; t < batch.num_tokens; ++t) {
      const bool is_pad = t >= batch.starts.back();
      const auto after = std::upper_bound(batch.starts.begin(), batch.starts.end(), t);
      const int32_t row = is_pad ? 0 : static_cast<int32_t>(after - batch.starts.begin()) - 1;
      REQUIRE(built.token_rows[t] == row);
      // Key blocks up to the one that holds the query's own position, in order.
      std::vector<int32_t> got, expected;
      const int32_t num_splits = built.partial_starts[t + 1] - built.partial_starts[t];
      for (int32_t split = 0; split < num_splits; ++split) {
        REQUIRE(reads.count({t, split}) == 1);
        const auto& blocks = reads.at({t, split});
        CHECK(static_cast<int32_t>(blocks.size()) <= options.run_blocks);
        got.insert(got.end(), blocks.begin(), blocks.end());
      }
      num_partials += num_splits;
      if (is_pad) {
        CHECK(num_splits == 0);
        continue;
      }
      const int32_t P = batch.prompt_lens[row];
      const int32_t position = P + batch.response_lens[row] - (batch.starts[row + 1] - t);
      const int64_t last = position < P ? position / 16 : blocks_for(P) + (position - P) / 16;
      for (int64_t j = 0; j <= last; ++j) expected.push_back(batch.block(row, j));
      REQUIRE(got.size() >= expected.size());  // the split's other blocks hold no key that it sees
      CHECK(static_cast<int32_t>(got.size() - expected.size()) < options.run_blocks);
      got.resize(expected.size());
      CHECK(got == expected);
    }
    CHECK(built.list.num_partials == num_partials);
    for (size_t i = 0; i < built.items.size(); ++i) {
      const WorkItem& item = built.items[i];
      if (static_cast<int64_t>(i) >= built.list.num_items) {
        REQUIRE(item.num_tokens == 0);
        continue;
      }
      CHECK(item.num_tokens > 0);
      CHECK(item.num_tokens <= options.tile_tokens);
      const int32_t last = item.first_token + item.num_tokens - 1;
      has_shared |=
          item.num_tokens > 0 && built.token_rows[item.first_token] != built.token_rows[last];
    }

    // Sharing changes who fetches, never what a partial result is made of.
    WorkListOptions alone = options;
    alone.min_shared_rows = 1000;
    const Built unshared(batch, alone);
    CHECK(unshared.partial_starts == built.partial_starts);
    CHECK(reads_of(batch, unshared) == reads);
    CHECK(unshared.list.num_items >= built.list.num_items);
  }
  CHECK(has_shared);
}

TEST_CASE("rows of one prompt share its splits from the thresholds on") {
  Batch batch;
  batch.width = 6;
  for (int32_t row = 0; row < 3; ++row) {  // 64 prompt tokens, then a block of one's own
    batch.add({0, 1, 2, 3, 4 + row}, 64, 4, 5, 1);
  }
  WorkListOptions options;
  options.tile_tokens = 2;
  options.run_blocks = 2;
  options.min_shared_rows = 3;
  options.min_shared_tokens = 64;
  // 2 splits of the prompt x 2 tiles of the three queries, then a split a row.
  CHECK(Built(batch, options).list.num_items == 7);
  CHECK(Built(batch, options).list.num_partials == 9);
  options.min_shared_rows = 4;
  CHECK(Built(batch, options).list.num_items == 9);
  options.min_shared_rows = 2;
  options.min_shared_tokens = 65;  // no cut either: [0, 2) [2, 4) [4, 5) by chance the same
  CHECK(Built(batch, options).list.num_items == 9);
  options.run_blocks = 3;  // [0, 3) [3, 5): the second split holds prompt and response
  CHECK(Built(batch, options).list.num_items == 6);
  options.min_shared_tokens = 64;  // [0, 3) [3, 4) [4, 5)
  CHECK(Built(batch, options).list.num_items == 7);

  batch.prompt_lens[1] = 63;  // another prompt, whatever its blocks
  CHECK(Built(batch, options).list.num_items == 8);
}

TEST_CASE("a work list refuses what does not fit") {
  Batch batch;
  batch.width = 4;
  batch.add({0, 1, 2}, 20, 2, 5, 3);
  batch.add({0, 1, 3}, 20, 2, 5, 1);
  const WorkListOptions options;
  const auto parameter_of = [&](const Batch& b, const WorkListOptions& o, int64_t max_items) {
    try {
      Built(b, o, max_items);
    } catch (const InvalidParameter& e) {
      return e.parameter + " " + e.requirement;
    }
    return std::string("none");
  };
  CHECK(Built(batch, options).list.num_items == 8);  // two splits of four queries
  CHECK(parameter_of(batch, options, 8) == "none");
  CHECK(parameter_of(batch, options, 7) == "max_items must be at least 8");
  const auto with = [&](auto change) {
    Batch changed = batch;
    change(&changed);
    return parameter_of(changed, options, 100).substr(0, 8);
  };
  CHECK(with([](Batch* b) { b->prompt_lens[0] = 65; }) == "prompt_l");
  CHECK(with([](Batch* b) { b->prompt_lens[0] = -1; }) == "prompt_l");
  CHECK(with([](Batch* b) { b->response_lens[1] = 33; }) == "response");
  CHECK(with([](Batch* b) { b->response_lens[1] = -1; }) == "response");
  CHECK(with([](Batch* b) { b->response_start[1] = 1; }) == "response");
  CHECK(with([](Batch* b) { b->starts[0] = 1; }) == "query_st");
  CHECK(with([](Batch* b) { b->starts[1] = 5; }) == "query_st");
  CHECK(with([](Batch* b) { b->num_tokens = 3; }) == "query_st");
  for (int32_t WorkListOptions::* option :
       {&WorkListOptions::tile_tokens, &WorkListOptions::run_blocks,
        &WorkListOptions::min_shared_rows, &WorkListOptions::min_shared_tokens}) {
    WorkListOptions none = options;
    none.*option = 0;
    CHECK(parameter_of(batch, none, 100) != "none");
  }
}
