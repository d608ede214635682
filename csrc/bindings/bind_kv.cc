// SPDX-License-Identifier: Apache-2.0
// The paged KV cache on the CPU: raw addresses as integers and sizes come in from ivg_fast.ops,
// which has checked dtypes and layouts. What is checked here is what only a walk over the indices
// can tell; a failed check comes back as (parameter, value, requirement), and ivg_fast.ops raises
// it.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/block_pairs.h"
#include "cpu/kernels.h"

namespace ivg::bindings {

namespace {

constexpr int64_t kBlockSize = 16;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

py::object failure(const char* parameter, int64_t value, const std::string& requirement) {
  return py::make_tuple(parameter, value, requirement);
}

py::object write_kv(uintptr_t src, int64_t token_stride, int64_t head_stride, uintptr_t pool,
                    int64_t num_blocks, uintptr_t slots, int64_t num_tokens, int64_t num_heads,
                    int64_t head_bytes, int32_t num_threads) {
  require(num_blocks >= 0 && num_tokens >= 0 && num_heads >= 0 && head_bytes >= 0, "negative size");
  const int32_t* slot = at<const int32_t>(slots);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slot[t] < -1 || slot[t] >= num_blocks * kBlockSize) {
      return failure("slot_mapping", slot[t],
                     "must hold slots in [-1, " + std::to_string(num_blocks * kBlockSize) + ")");
    }
  }
  py::gil_scoped_release release;
  cpu::kernels().write_kv({at<const void>(src), token_stride, head_stride, at<void>(pool), slot,
                           num_tokens, num_heads, head_bytes, num_threads});
  return py::none();
}

py::object copy_blocks(uintptr_t pools, uintptr_t block_bytes, int64_t num_pools, uintptr_t pairs,
                       int64_t num_pairs, int64_t num_blocks, int32_t num_threads) {
  require(num_pools >= 0 && num_pairs >= 0 && num_blocks >= 0, "negative size");
  const int32_t* pair = at<const int32_t>(pairs);
  py::object failed = find_bad_pair(pair, num_pairs, num_blocks);
  if (!failed.is_none()) return failed;
  py::gil_scoped_release release;
  cpu::kernels().copy_blocks({at<void* const>(pools), at<const int64_t>(block_bytes), pair,
                              num_pools, num_pairs, num_threads});
  return py::none();
}

// The rows of one packed batch. Every index in it has been checked against the table's width, so
// that the kernel needs only a pool of more than max_block_id blocks. It owns copies: nobody can
// change them after the check.
struct AttentionBatch {
  std::vector<int32_t> block_table, query_start_loc, prompt_lens, response_lens,
      response_block_start, group_start;
  int64_t num_rows = 0;
  int64_t table_width = 0;
  int64_t num_tokens = 0;
  int64_t max_query_len = 0;
  int64_t max_seq_len = 0;
  int64_t max_block_id = -1;

  // block_table, query_start_loc, prompt_lens, response_lens, response_block_start, as views.
  py::tuple arrays(const py::object& self) const {
    const auto view = [&](const std::vector<int32_t>& data) {
      return py::array_t<int32_t>(static_cast<py::ssize_t>(data.size()), data.data(), self);
    };
    const py::array_t<int32_t> table({num_rows, table_width}, block_table.data(), self);
    return py::make_tuple(table, view(query_start_loc), view(prompt_lens), view(response_lens),
                          view(response_block_start));
  }

  void run(uintptr_t query, int64_t token_stride, int64_t head_stride, uintptr_t key_pool,
           uintptr_t value_pool, uintptr_t out, int64_t num_heads, int64_t num_kv_heads,
           int64_t key_size, int64_t value_size, int32_t dtype, double scale,
           int64_t sliding_window, double soft_cap, uintptr_t sinks, int32_t num_threads) const {
    require(num_heads > 0 && num_kv_heads > 0 && num_heads % num_kv_heads == 0, "bad head counts");
    require(key_size > 0 && key_size <= cpu::kMaxHeadSize, "bad key size");
    require(value_size > 0 && value_size <= cpu::kMaxHeadSize, "bad value size");
    require(dtype >= 0 && dtype <= static_cast<int32_t>(cpu::DType::kFloat16), "bad dtype");
    require(sliding_window >= 0, "negative sliding window");
    cpu::PagedAttentionArgs args{};
    args.query = at<const void>(query);
    args.query_token_stride = token_stride;
    args.query_head_stride = head_stride;
    args.key_pool = at<const void>(key_pool);
    args.value_pool = at<const void>(value_pool);
    args.out = at<void>(out);
    args.block_table = block_table.data();
    args.query_start_loc = query_start_loc.data();
    args.prompt_lens = prompt_lens.data();
    args.response_lens = response_lens.data();
    args.response_block_start = response_block_start.data();
    args.group_start = group_start.data();
    args.num_groups = static_cast<int64_t>(group_start.size()) - 1;
    args.sinks = at<const float>(sinks);
    args.num_rows = num_rows;
    args.table_width = table_width;
    args.num_heads = num_heads;
    args.num_kv_heads = num_kv_heads;
    args.key_size = key_size;
    args.value_size = value_size;
    args.sliding_window = sliding_window;
    args.scale = static_cast<float>(scale);
    args.soft_cap = static_cast<float>(soft_cap);
    args.dtype = static_cast<cpu::DType>(dtype);
    args.num_threads = num_threads;
    py::gil_scoped_release release;
    cpu::kernels().paged_attention(args);
  }

  // Rows that stand together and share a prompt worth sharing: each of its keys is then loaded once
  // for all of them. Groups never reach over two requests, so that neighbours stay without effect.
  void find_groups() {
    constexpr int32_t kShareFrom = 2 * kBlockSize;  // tokens
    const auto can_share = [&](int64_t row) {
      const int32_t queries = query_start_loc[row + 1] - query_start_loc[row];
      return prompt_lens[row] >= kShareFrom && queries > 0 && queries <= response_lens[row];
    };
    const auto has_same_prompt = [&](int64_t row, int64_t other) {
      const auto table = block_table.begin();
      const int64_t num_blocks = (prompt_lens[row] + kBlockSize - 1) / kBlockSize;
      return prompt_lens[row] == prompt_lens[other] &&
             std::equal(table + row * table_width, table + row * table_width + num_blocks,
                        table + other * table_width);
    };
    group_start.assign(1, 0);
    for (int64_t row = 1; row < num_rows; ++row) {
      if (!can_share(row) || !can_share(row - 1) || !has_same_prompt(row, row - 1)) {
        group_start.push_back(static_cast<int32_t>(row));
      }
    }
    if (num_rows > 0) group_start.push_back(static_cast<int32_t>(num_rows));
  }
};

std::string in_row(const char* what, int64_t row) {
  return std::string(what) + " (row " + std::to_string(row) + ")";
}

py::object make_attention_batch(uintptr_t block_table, int64_t table_width,
                                uintptr_t query_start_loc, uintptr_t prompt_lens,
                                uintptr_t response_lens, uintptr_t response_block_start,
                                int64_t num_rows) {
  require(num_rows >= 0 && table_width >= 0, "negative size");
  const auto copy = [](uintptr_t address, int64_t count) {
    const int32_t* begin = at<const int32_t>(address);
    return std::vector<int32_t>(begin, begin + count);
  };
  AttentionBatch batch;
  batch.num_rows = num_rows;
  batch.table_width = table_width;
  batch.block_table = copy(block_table, num_rows * table_width);
  batch.query_start_loc = copy(query_start_loc, num_rows + 1);
  batch.prompt_lens = copy(prompt_lens, num_rows);
  batch.response_lens = copy(response_lens, num_rows);
  batch.response_block_start = copy(response_block_start, num_rows);
  if (batch.query_start_loc[0] != 0) {
    return failure("query_start_loc", batch.query_start_loc[0], "must begin with 0");
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t queries =
        static_cast<int64_t>(batch.query_start_loc[row + 1]) - batch.query_start_loc[row];
    const int64_t prompt = batch.prompt_lens[row];
    const int64_t response = batch.response_lens[row];
    const int64_t start = batch.response_block_start[row];
    const int64_t prompt_blocks = (prompt + kBlockSize - 1) / kBlockSize;
    const int64_t response_blocks = (response + kBlockSize - 1) / kBlockSize;
    if (queries < 0) {
      return failure("query_start_loc", batch.query_start_loc[row + 1],
                     in_row("must not decrease", row));
    }
    if (prompt < 0 || prompt_blocks > table_width) {
      return failure("prompt_lens", prompt, in_row("must fit the block table", row));
    }
    if (start < 0 || (response > 0 && start < prompt_blocks)) {
      return failure("response_block_start", start, in_row("must lie behind the prompt", row));
    }
    if (response < 0 || (response > 0 && start + response_blocks > table_width)) {
      return failure("response_lens", response, in_row("must fit the block table", row));
    }
    if (queries > prompt + response) {
      return failure("query_start_loc", queries,
                     in_row("must hold at most as many queries as the row has keys", row));
    }
    const int32_t* table = batch.block_table.data() + row * table_width;
    const auto check = [&](int64_t first, int64_t last) -> const int32_t* {
      for (const int32_t* id = table + first; id < table + last; ++id) {
        if (*id < 0) return id;
        batch.max_block_id = std::max<int64_t>(batch.max_block_id, *id);
      }
      return nullptr;
    };
    const int32_t* bad = check(0, prompt_blocks);
    if (bad == nullptr && response > 0) bad = check(start, start + response_blocks);
    if (bad != nullptr) {
      return failure("block_table", *bad, in_row("must hold block ids from 0 on", row));
    }
    batch.max_query_len = std::max(batch.max_query_len, queries);
    batch.max_seq_len = std::max(batch.max_seq_len, prompt + response);
  }
  batch.num_tokens = batch.query_start_loc[num_rows];
  batch.find_groups();
  return py::cast(std::move(batch));
}

}  // namespace

void bind_kv(py::module_& m) {
  m.attr("max_head_size") = cpu::kMaxHeadSize;
  m.def("write_kv", &write_kv);
  m.def("copy_blocks", &copy_blocks);
  m.def("find_bad_pair", [](uintptr_t pairs, int64_t num_pairs, int64_t num_blocks) {
    require(num_pairs >= 0 && num_blocks >= 0, "negative size");
    return find_bad_pair(at<const int32_t>(pairs), num_pairs, num_blocks);
  });
  py::class_<AttentionBatch>(m, "AttentionBatch")
      .def_readonly("num_rows", &AttentionBatch::num_rows)
      .def_readonly("num_tokens", &AttentionBatch::num_tokens)
      .def_readonly("max_query_len", &AttentionBatch::max_query_len)
      .def_readonly("max_seq_len", &AttentionBatch::max_seq_len)
      .def_readonly("max_block_id", &AttentionBatch::max_block_id)
      .def("arrays",
           [](const py::object& self) { return self.cast<const AttentionBatch&>().arrays(self); })
      .def("run", &AttentionBatch::run);
  m.def("make_attention_batch", &make_attention_batch);
}

}  // namespace ivg::bindings
