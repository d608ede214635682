// SPDX-License-Identifier: Apache-2.0
#include "scheduler/work_list.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "scheduler/block_pool.h"
#include "scheduler/errors.h"

namespace ivg {

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One row and how its key blocks are cut.
struct Row {
  int64_t first_token, end_token;
  int64_t prompt_len, num_keys;
  int64_t prompt_blocks, num_blocks;
  int64_t cut;         // no split goes across this block: the prompt's end, or 0 for no cut
  int64_t num_splits;  // of the whole row
  int64_t num_shared;  // leading blocks in common with the next row; 0 if they are too few

  int64_t cut_splits(int64_t run) const { return divide_up(cut, run); }

  int64_t split_begin(int64_t split, int64_t run) const {
    const int64_t before = cut_splits(run);
    return split < before ? split * run : cut + (split - before) * run;
  }
  int64_t split_end(int64_t split, int64_t run) const {
    const bool is_before = split < cut_splits(run);
    return std::min(split_begin(split, run) + run, is_before ? cut : num_blocks);
  }

  // Splits that the query `token` can see; it stands at position num_keys - (end_token - token).
  int64_t visible_splits(int64_t token, int64_t run) const {
    const int64_t position = num_keys - (end_token - token);
    if (position < 0) return 0;
    const int64_t block = position < prompt_len
                              ? position / kBlockSize
                              : prompt_blocks + (position - prompt_len) / kBlockSize;
    if (block < cut) return block / run + 1;
    return cut_splits(run) + (block - cut) / run + 1;
  }
};

void require(bool holds, const char* parameter, int64_t value, const char* requirement) {
  if (!holds) throw InvalidParameter(parameter, value, requirement);
}

Row read_row(const AttentionRows& rows, const WorkListOptions& options, int64_t i) {
  const int64_t response = rows.response_lens[i];
  const int64_t start = rows.response_block_start[i];
  Row row{};
  row.first_token = rows.query_start_loc[i];
  row.end_token = rows.query_start_loc[i + 1];
  row.prompt_len = rows.prompt_lens[i];
  require(row.first_token <= row.end_token && row.end_token <= rows.num_tokens, "query_start_loc",
          row.end_token, "must not decrease, nor pass the number of tokens");
  require(row.prompt_len >= 0 && divide_up(row.prompt_len, kBlockSize) <= rows.table_width,
          "prompt_lens", row.prompt_len, "must fit the block table");
  row.prompt_blocks = divide_up(row.prompt_len, kBlockSize);
  const int64_t response_blocks = divide_up(std::max<int64_t>(response, 0), kBlockSize);
  require(response >= 0 && (response == 0 || start + response_blocks <= rows.table_width),
          "response_lens", response, "must fit the block table");
  require(start >= 0 && (response == 0 || start >= row.prompt_blocks), "response_block_start",
          start, "must lie behind the prompt");
  row.num_keys = row.prompt_len + response;
  row.num_blocks = row.prompt_blocks + response_blocks;
  row.cut = row.prompt_len >= options.min_shared_tokens ? row.prompt_blocks : 0;
  row.num_splits =
      row.cut_splits(options.run_blocks) + divide_up(row.num_blocks - row.cut, options.run_blocks);
  return row;
}

// Leading blocks that rows i and i + 1 have in common, at equal positions.
int64_t count_shared(const AttentionRows& rows, const std::vector<Row>& all, int64_t i) {
  const Row &a = all[i], &b = all[i + 1];
  if (a.prompt_len != b.prompt_len || a.first_token == a.end_token ||
      b.first_token == b.end_token) {
    return 0;
  }
  const int32_t* table_a = rows.block_table + i * rows.table_width;
  const int32_t* table_b = table_a + rows.table_width;
  const int64_t skip_a = rows.response_block_start[i] - a.prompt_blocks;
  const int64_t skip_b = rows.response_block_start[i + 1] - b.prompt_blocks;
  const int64_t limit = std::min(a.num_blocks, b.num_blocks);
  int64_t n = 0;
  while (n < std::min(limit, a.prompt_blocks) && table_a[n] == table_b[n]) ++n;
  if (n < a.prompt_blocks) return n;
  while (n < limit && table_a[n + skip_a] == table_b[n + skip_b]) ++n;
  return n;
}

class Builder {
 public:
  Builder(const AttentionRows& rows, const WorkListOptions& options, WorkList* list)
      : rows_(rows), options_(options), run_(options.run_blocks), list_(*list) {
    for (int64_t i = 0; i < rows.num_rows; ++i) all_.push_back(read_row(rows, options, i));
    for (int64_t i = 0; i + 1 < rows.num_rows; ++i) {
      const int64_t shared = count_shared(rows, all_, i);
      all_[i].num_shared = shared * kBlockSize >= options.min_shared_tokens ? shared : 0;
    }
  }

  void build() {
    place_tokens();
    int64_t max_splits = 0;
    for (const Row& row : all_) max_splits = std::max(max_splits, row.num_splits);
    for (int64_t split = 0; split < max_splits; ++split) {
      for (int64_t first = 0; first < rows_.num_rows;) {
        int64_t end = first + 1;
        while (end < rows_.num_rows && are_joined(end - 1, split)) ++end;
        if (end - first >= options_.min_shared_rows) {
          add_items(first, end, split);
        } else {
          for (int64_t row = first; row < end; ++row) add_items(row, row + 1, split);
        }
        first = end;
      }
    }
    if (list_.num_items > list_.max_items) {
      throw InvalidParameter("max_items", list_.max_items,
                             "must be at least " + std::to_string(list_.num_items));
    }
    std::fill(list_.items + list_.num_items, list_.items + list_.max_items, WorkItem{});
  }

 private:
  void place_tokens() {
    list_.num_items = 0;
    int64_t next = 0, token = 0;
    const auto place = [&](int64_t row, int64_t partials) {
      list_.token_rows[token] = static_cast<int32_t>(row);
      list_.partial_starts[token++] = static_cast<int32_t>(std::min(next, kMaxInt32));
      next += partials;
    };
    for (int64_t i = 0; i < rows_.num_rows; ++i) {
      while (token < all_[i].end_token) place(i, all_[i].visible_splits(token, run_));
    }
    while (token < rows_.num_tokens) place(0, 0);
    list_.partial_starts[token] = static_cast<int32_t>(std::min(next, kMaxInt32));
    list_.num_partials = next;
    if (next > list_.max_partials || next > kMaxInt32) {
      throw InvalidParameter("max_partials", list_.max_partials,
                             "must be at least " + std::to_string(next));
    }
  }

  bool are_joined(int64_t i, int64_t split) const {
    const Row &a = all_[i], &b = all_[i + 1];
    if (split >= a.num_splits || split >= b.num_splits) return false;
    const int64_t end = a.split_end(split, run_);
    return end <= a.num_shared && end == b.split_end(split, run_);
  }

  // The tiles of rows [first, end), which hold the same blocks in this split.
  void add_items(int64_t first, int64_t end, int64_t split) {
    const Row& row = all_[first];
    if (split >= row.num_splits) return;
    const int64_t end_token = all_[end - 1].end_token;
    for (int64_t token = row.first_token; token < end_token; token += options_.tile_tokens) {
      const int64_t num_tokens = std::min<int64_t>(options_.tile_tokens, end_token - token);
      const auto* starts = list_.partial_starts + token;
      bool is_seen = false;
      for (int64_t t = 0; t < num_tokens; ++t) is_seen |= starts[t] + split < starts[t + 1];
      if (!is_seen) continue;
      if (list_.num_items < list_.max_items) {
        list_.items[list_.num_items] = {static_cast<int32_t>(first),
                                        static_cast<int32_t>(token),
                                        static_cast<int32_t>(num_tokens),
                                        static_cast<int32_t>(row.split_begin(split, run_)),
                                        static_cast<int32_t>(row.split_end(split, run_)),
                                        static_cast<int32_t>(split)};
      }
      ++list_.num_items;
    }
  }

  const AttentionRows& rows_;
  const WorkListOptions& options_;
  const int64_t run_;
  WorkList& list_;
  std::vector<Row> all_;
};

}  // namespace

void build_work_list(const AttentionRows& rows, const WorkListOptions& options, WorkList* list) {
  require(options.tile_tokens > 0, "tile_tokens", options.tile_tokens, "must be positive");
  require(options.run_blocks > 0, "run_blocks", options.run_blocks, "must be positive");
  require(options.min_shared_rows > 0, "min_shared_rows", options.min_shared_rows,
          "must be positive");
  require(options.min_shared_tokens > 0, "min_shared_tokens", options.min_shared_tokens,
          "must be positive");
  require(rows.num_rows >= 0 && rows.table_width >= 0 && rows.num_tokens >= 0, "num_rows",
          rows.num_rows, "must not be negative, nor any other size");
  require(rows.query_start_loc[0] == 0, "query_start_loc", rows.query_start_loc[0],
          "must begin with 0");
  Builder(rows, options, list).build();
}

}  // namespace ivg
