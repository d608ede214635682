// SPDX-License-Identifier: Apache-2.0
#include "scheduler/search.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <set>

#include "driver.h"

using namespace ivg;
using testing::make_spec;

namespace {

using Ids = std::vector<int32_t>;

Search& start(Search& search) {
  search.allocate_prompt();
  search.branch_prompt();
  return search;
}

// Every unfinished candidate draws `n` tokens (token: the candidate's id).
void draw(Search* search, int32_t n) {
  for (Candidate& candidate : search->pool) {
    if (candidate.is_finished()) continue;
    search->reserve_tokens(&candidate, n);
    candidate.recent.resize(candidate.recent.size() + n, {candidate.id, -1, -2, 0.5f});
    candidate.length += n;
    if (candidate.length == search->spec.max_tokens) candidate.finish = Finish::kLength;
  }
  search->chunk_step += n;
}

void score(Search* search, const std::vector<double>& scores) {
  REQUIRE(scores.size() == search->pool.size());
  for (size_t i = 0; i < scores.size(); ++i) search->pool[i].score = scores[i];
}

Ids ids(const std::vector<Candidate>& candidates) {
  Ids out;
  for (const Candidate& candidate : candidates) out.push_back(candidate.id);
  return out;
}

Ids tokens(const Candidate& candidate) {
  Ids out;
  for (const TokenRecord& record : candidate.history()) out.push_back(record.token);
  return out;
}

}  // namespace

TEST_CASE("fork: full blocks shared, the partial block copied for all children but the last") {
  BlockPool blocks(100);
  Search search(make_spec(1, 3, 20, 100, 40), &blocks);
  start(search);
  CHECK(search.prompt_table.size() == 3);
  const Ids prompt = search.prompt_table;
  draw(&search, 20);
  CHECK(blocks.num_used() == 3 + 3 * 2);
  score(&search, {0, 2, 1});
  const Ids parent = search.pool[1].blocks;
  CHECK_FALSE(search.select());
  CHECK(blocks.num_used() == 3 + 2);  // the losers are free before any child allocates
  CHECK(search.pool.empty());
  CHECK(ids(search.survivors) == Ids{1});

  std::vector<BlockCopy> copies;
  search.fork(&copies);
  REQUIRE(search.pool.size() == 3);
  REQUIRE(copies.size() == 2);
  for (int c = 0; c < 3; ++c) {
    const Ids& table = search.pool[c].blocks;
    REQUIRE(table.size() == 2);
    CHECK(table[0] == parent[0]);
    CHECK(blocks.ref_count(table[1]) == 1);
    if (c == 2) {
      CHECK(table[1] == parent[1]);  // taken over
    } else {
      CHECK(copies[c].src == parent[1]);
      CHECK(copies[c].dst == table[1]);
    }
  }
  CHECK(blocks.ref_count(parent[0]) == 3);
  CHECK(search.prompt_table == prompt);
  for (const int32_t block : prompt) CHECK(blocks.ref_count(block) == 1);
  CHECK(search.num_blocks_copied == 2);
  CHECK(search.num_blocks_held == 3 + 1 + 3);
  CHECK(blocks.num_used() == search.num_blocks_held);

  // The second fork, at 32 tokens: nothing is partly filled.
  draw(&search, 12);
  score(&search, {1, 2, 0});
  CHECK_FALSE(search.select());
  copies.clear();
  search.fork(&copies);
  CHECK(copies.empty());
  for (const Candidate& child : search.pool) CHECK(child.blocks == search.pool[0].blocks);
  CHECK(blocks.ref_count(search.pool[0].blocks[1]) == 3);
  CHECK(search.num_blocks_held == 3 + 2);
  CHECK(blocks.num_used() == search.num_blocks_held);
}

TEST_CASE("with one child a survivor nothing is copied") {
  BlockPool blocks(100);
  Search search(make_spec(3, 1, 5, 100), &blocks);
  start(search);
  draw(&search, 5);
  score(&search, {0, 1, 2});
  CHECK_FALSE(search.select());
  std::vector<BlockCopy> copies;
  search.fork(&copies);
  CHECK(copies.empty());
  CHECK(ids(search.pool) == Ids{0, 1, 2});
  CHECK(tokens(search.pool[0]) == Ids{2, 2, 2, 2, 2});
}

TEST_CASE("the global best W survive, ties go to the lower id, children are numbered c * W + r") {
  BlockPool blocks(100);
  Search search(make_spec(2, 3, 1, 10), &blocks);
  start(search);
  CHECK(ids(search.pool) == Ids{0, 1, 2, 3, 4, 5});
  draw(&search, 1);
  // Candidates 0, 2, 4 descend from one parent in the public layout: all survivors may be theirs.
  score(&search, {1, 0, 3, -0.0, 3, 0});
  CHECK_FALSE(search.select());
  CHECK(ids(search.survivors) == Ids{2, 4});
  std::vector<BlockCopy> copies;
  search.fork(&copies);
  CHECK(ids(search.pool) == Ids{0, 1, 2, 3, 4, 5});
  for (const Candidate& child : search.pool) CHECK(tokens(child) == Ids{child.id % 2 ? 4 : 2});
  CHECK(search.chunk_start == 1);
  CHECK(search.chunk_step == 0);
}

TEST_CASE("selection agrees with sorting everything") {
  std::mt19937 rng(20240917);
  for (int trial = 0; trial < 300; ++trial) {
    const int32_t W = 1 + rng() % 5, K = 1 + rng() % 5;
    const bool dedup = rng() % 2;
    CAPTURE(trial);
    BlockPool blocks(500);
    RequestSpec spec = make_spec(W, K, 3, 1000);
    spec.dedup_finished = dedup;
    Search search(spec, &blocks);
    start(search);
    for (int selection = 0; selection < 4; ++selection) {
      draw(&search, 3);
      std::vector<double> scores;
      for (Candidate& candidate : search.pool) {
        if (!candidate.is_finished() && rng() % 5 == 0) {
          candidate.finish = Finish::kStopText;
          candidate.stop_index = static_cast<int32_t>(rng() % 3);
        }
        // Few distinct values: ties. A clone keeps the score that it has.
        scores.push_back(candidate.recent.empty() ? candidate.score : static_cast<int>(rng() % 4));
      }
      score(&search, scores);
      struct Row {
        double score;
        int32_t id;
        bool is_finished;
        int32_t stop_index;
        Ids tokens;
      };
      std::vector<Row> rows;
      for (const Candidate& c : search.pool) {
        rows.push_back({c.score, c.id, c.is_finished(), c.stop_index, tokens(c)});
      }
      std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
        return a.score != b.score ? a.score > b.score : a.id < b.id;
      });
      rows.resize(W);
      const bool all_finished =
          std::all_of(rows.begin(), rows.end(), [](const Row& row) { return row.is_finished; });
      const bool is_over = search.select();
      REQUIRE(is_over == all_finished);
      if (is_over) {
        REQUIRE(search.pool.size() == 1);
        CHECK(search.pool[0].id == rows[0].id);
        CHECK(tokens(search.pool[0]) == rows[0].tokens);
        CHECK(blocks.num_used() == 0);
        break;
      }
      REQUIRE(static_cast<int32_t>(search.survivors.size()) == W);
      for (int32_t r = 0; r < W; ++r) {
        CHECK(search.survivors[r].id == rows[r].id);
        CHECK(search.survivors[r].blocks.empty() == rows[r].is_finished);
      }
      std::vector<BlockCopy> copies;
      search.fork(&copies);
      size_t at = 0;
      for (int32_t c = 0; c < K; ++c) {
        for (int32_t r = 0; r < W; ++r) {
          if (dedup && c > 0 && rows[r].is_finished) continue;
          REQUIRE(at < search.pool.size());
          const Candidate& child = search.pool[at++];
          CHECK(child.id == c * W + r);
          CHECK(child.is_finished() == rows[r].is_finished);
          CHECK(child.is_scored == rows[r].is_finished);
          CHECK(child.stop_index == rows[r].stop_index);
          CHECK(tokens(child) == rows[r].tokens);
          CHECK(child.score == rows[r].score);
        }
      }
      CHECK(at == search.pool.size());
      blocks.check_integrity();
    }
  }
}

TEST_CASE("each clone of a finished survivor holds a place, one place with dedup_finished") {
  for (const bool dedup : {false, true}) {
    CAPTURE(dedup);
    BlockPool blocks(100);
    RequestSpec spec = make_spec(2, 2, 1, 10);
    spec.dedup_finished = dedup;
    Search search(spec, &blocks);
    start(search);
    draw(&search, 1);
    search.pool[3].finish = Finish::kStop;
    score(&search, {1, 0, 0, 9});
    CHECK_FALSE(search.select());
    CHECK(ids(search.survivors) == Ids{3, 0});
    CHECK(search.survivors[0].blocks.empty());
    std::vector<BlockCopy> copies;
    search.fork(&copies);
    CHECK(copies.size() == 1);  // of the unfinished survivor alone
    draw(&search, 1);
    if (dedup) {
      CHECK(ids(search.pool) == Ids{0, 1, 3});
      score(&search, {9, 4, 5});
      CHECK_FALSE(search.select());  // the freed place goes to the next rank
      CHECK(ids(search.survivors) == Ids{0, 3});
    } else {
      CHECK(ids(search.pool) == Ids{0, 1, 2, 3});
      score(&search, {9, 4, 9, 5});
      CHECK(search.select());  // the clones crowd the others out: all survivors are finished
      CHECK(search.pool[0].id == 0);
      CHECK(tokens(search.pool[0]) == Ids{3});
    }
  }
}

TEST_CASE("the n best of the last pool, clones once") {
  BlockPool blocks(100);
  RequestSpec spec = make_spec(2, 2, 2, 4);
  spec.num_outputs = 4;
  Search search(spec, &blocks);
  start(search);
  draw(&search, 2);
  search.pool[1].finish = Finish::kStop;
  score(&search, {3, 5, 2, 1});
  CHECK_FALSE(search.select());
  std::vector<BlockCopy> copies;
  search.fork(&copies);
  draw(&search, 2);
  score(&search, {5, 5, 5, 7});
  CHECK(search.select());  // at max_tokens
  CHECK(ids(search.pool) == Ids{3, 0, 1});
  CHECK(search.pool[0].finish == Finish::kLength);
  CHECK(search.pool[1].finish == Finish::kStop);
  CHECK(tokens(search.pool[1]) == Ids{1, 1});
  CHECK(tokens(search.pool[0]) == Ids{0, 0, 3, 3});
  CHECK(search.num_blocks_held == 0);
  CHECK(blocks.num_used() == 0);
}

TEST_CASE("what the end of the search leaves unfinished is reported as such") {
  BlockPool blocks(100);
  RequestSpec spec = make_spec(1, 3, 2, 10);
  spec.num_outputs = 2;
  Search search(spec, &blocks);
  start(search);
  draw(&search, 2);
  search.pool[2].finish = Finish::kStop;
  score(&search, {1, 2, 3});
  CHECK(search.select());  // the only survivor is finished
  CHECK(ids(search.pool) == Ids{2, 1});
  CHECK(search.pool[0].finish == Finish::kStop);
  CHECK(search.pool[1].finish == Finish::kAbort);
  CHECK(blocks.num_used() == 0);
}

TEST_CASE("clones that survive twice are still one output") {
  BlockPool blocks(100);
  RequestSpec spec = make_spec(2, 2, 1, 3);
  spec.num_outputs = 4;
  Search search(spec, &blocks);
  start(search);
  draw(&search, 1);
  search.pool[0].finish = Finish::kStop;
  score(&search, {1, 2, 0, 0});
  CHECK_FALSE(search.select());
  std::vector<BlockCopy> copies;
  search.fork(&copies);  // ranks: 1, 0; the finished one is rank 1
  draw(&search, 1);
  score(&search, {3, 1, 0, 1});
  CHECK_FALSE(search.select());
  CHECK(ids(search.survivors) == Ids{0, 1});
  search.fork(&copies);
  draw(&search, 1);
  score(&search, {0, 1, 0, 1});
  CHECK(search.select());
  CHECK(ids(search.pool) == Ids{1, 0, 2});
}

TEST_CASE("a search that is cut short reports what there is") {
  BlockPool blocks(100);
  RequestSpec spec = make_spec(2, 2, 2, 10);
  spec.num_outputs = 4;
  SUBCASE("before the first token: one empty candidate") {
    Search search(spec, &blocks);
    search.finalize(Finish::kAbort);
    REQUIRE(search.pool.size() == 1);
    CHECK(search.pool[0].finish == Finish::kAbort);
    CHECK(search.pool[0].length == 0);
  }
  SUBCASE("branched, but nothing drawn: still one") {
    Search search(spec, &blocks);
    start(search).finalize(Finish::kDeadline);
    CHECK(search.pool.size() == 1);
    CHECK(search.pool[0].finish == Finish::kDeadline);
  }
  SUBCASE("forked, but nothing drawn: the survivors, once each") {
    Search search(spec, &blocks);
    start(search);
    draw(&search, 2);
    score(&search, {0, 1, 2, 3});
    CHECK_FALSE(search.select());
    std::vector<BlockCopy> copies;
    search.fork(&copies);
    search.finalize(Finish::kAbort);
    REQUIRE(search.pool.size() == 2);
    CHECK(tokens(search.pool[0]) == Ids{3, 3});
    CHECK(tokens(search.pool[1]) == Ids{2, 2});
  }
  SUBCASE("between selection and fork: the survivors; a finished one keeps its reason") {
    Search search(spec, &blocks);
    start(search);
    draw(&search, 2);
    search.pool[3].finish = Finish::kStop;
    score(&search, {0, 1, 2, 3});
    CHECK_FALSE(search.select());
    search.finalize(Finish::kAbort);
    REQUIRE(search.pool.size() == 2);
    CHECK(search.pool[0].finish == Finish::kStop);
    CHECK(search.pool[1].finish == Finish::kAbort);
  }
  CHECK(blocks.num_used() == 0);
  blocks.check_integrity();
}

TEST_CASE("worst_case_blocks is the formula of the design") {
  CHECK(make_spec(4, 4, 5, 50, 20).worst_case_blocks() == 2 + 4 * 4 + 16 * 2);
  CHECK(make_spec(1, 8, 0, 50, 16).worst_case_blocks() == 1 + 8 * 4);
  CHECK(make_spec(2, 2, 1, 16, 17).worst_case_blocks() == 2 + 2 * 1 + 4 * 1);
  CHECK(make_spec(2, 2, 2, 16, 17).worst_case_blocks() == 2 + 2 * 1 + 4 * 2);
  RequestSpec reads = make_spec(2, 2, 2, 16, 17);
  reads.reads_eos = true;  // a slot more a row
  CHECK(reads.worst_case_blocks() == 2 + 2 * 2 + 4 * 2);
  reads.chunk_length = 0;
  CHECK(reads.worst_case_blocks() == 2 + 4 * 2);
  RequestSpec roles = make_spec(1, 1, 0, 1);
  roles.prompt_lens = {3, 0, 33};
  CHECK(roles.prompt_blocks() == 3);
  RequestSpec huge = make_spec(1 << 12, 1 << 12, INT32_MAX, 1 << 24, 1 << 24);
  CHECK(huge.worst_case_blocks() ==
        (1 << 20) + (int64_t{1} << 32) + (int64_t{1} << 24) * ((1 << 27) + 1));
}

TEST_CASE("a long ancestry is destroyed and read without recursion") {
  Candidate candidate;
  for (int32_t t = 0; t < 100'000; ++t) {
    candidate.past = std::make_shared<const Segment>(
        std::move(candidate.past), std::vector<TokenRecord>{{t, 0.0f, 0.0f, 0.0f}});
    ++candidate.length;
  }
  const auto history = candidate.history();
  CHECK(history.front().token == 0);
  CHECK(history.back().token == 99'999);
  const std::shared_ptr<const Segment> middle = candidate.past->parent;
  candidate.past.reset();
  CHECK(middle->records[0].token == 99'998);  // what another holds stays whole
  CHECK(middle->parent->records[0].token == 99'997);
}
