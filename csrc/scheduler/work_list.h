// SPDX-License-Identifier: Apache-2.0
// What a paged attention kernel works on: which queries read which blocks, as fixed-size arrays.
//
// A row's key blocks are numbered j = 0, 1, ...: first those of its prompt, then those of its
// response, whatever columns of the table they stand in. They are cut into splits, by a rule that
// looks at the row alone, and each split into items: tiles of queries times one split. Rows that
// stand side by side and hold the same blocks in a split may share its items: each query's partial
// results are made of the same keys then, only fetched once for all.
//
//   row 0:  [ prompt, shared  )[ response )        items:  rows 0-2 x split 0, rows 0-2 x split 1,
//   row 1:  [ prompt, shared  )[ response )                row 0 x split 2, row 1 x split 2, ...
//   row 2:  [ prompt, shared  )[ response )
#pragma once

#include <cstdint>

namespace ivg {

// The rows of one role's batch, as the attention op takes them.
struct AttentionRows {
  const int32_t* block_table;      // [num_rows, table_width]
  const int32_t* query_start_loc;  // [num_rows + 1], from 0
  const int32_t* prompt_lens;      // [num_rows]
  const int32_t* response_lens;    // [num_rows] the longest that a response gets in the list's life
  const int32_t* response_block_start;  // [num_rows]
  int64_t num_rows;
  int64_t table_width;
  int64_t num_tokens;  // at least query_start_loc[num_rows]; the rest are pads that see no key
};

struct WorkListOptions {
  int32_t tile_tokens = 1;      // the most queries of an item
  int32_t run_blocks = 16;      // the most blocks of a split
  int32_t min_shared_rows = 2;  // fewer rows than these do not share
  // Rows that begin with fewer equal keys than these do not share; a prompt of at least as many is
  // cut off from its response, so that no split holds both.
  int32_t min_shared_tokens = 1;
};

struct WorkItem {
  int32_t row;          // its table tells the blocks
  int32_t first_token;  // queries [first_token, first_token + num_tokens), of one or several rows
  int32_t num_tokens;   // 0: nothing to do
  int32_t first_block;  // key blocks [first_block, end_block)
  int32_t end_block;
  int32_t split;  // which partial result of its queries this is
};

// Token t leaves its partial results at [partial_starts[t], partial_starts[t + 1]), one a split
// that it can see when its row is as long as it gets.
struct WorkList {
  WorkItem* items;          // [max_items]; those behind num_items become empty
  int32_t* token_rows;      // [num_tokens]; 0 for pads
  int32_t* partial_starts;  // [num_tokens + 1]
  int64_t max_items;
  int64_t max_partials;

  int64_t num_items = 0;
  int64_t num_partials = 0;
};

// Fills `list`. Throws InvalidParameter where an index points outside the table or where the list
// is too small (then with the size that it needs); the arrays hold nothing useful after that.
void build_work_list(const AttentionRows& rows, const WorkListOptions& options, WorkList* list);

}  // namespace ivg
