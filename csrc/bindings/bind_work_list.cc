// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <initializer_list>
#include <string>

#include "bindings/bind.h"
#include "scheduler/errors.h"
#include "scheduler/work_list.h"

namespace ivg::bindings {

namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;

void check_shape(const Ints& array, const char* name, std::initializer_list<py::ssize_t> shape) {
  const bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size()) &&
                    std::equal(shape.begin(), shape.end(), array.shape());
  if (!fits) throw py::value_error(std::string(name) + " has the wrong shape");
}

py::tuple build(const Ints& block_table, const Ints& query_start_loc, const Ints& prompt_lens,
                const Ints& response_lens, const Ints& response_block_start, int32_t tile_tokens,
                int32_t run_blocks, int32_t min_shared_rows, int32_t min_shared_tokens, Ints items,
                Ints token_rows, Ints partial_starts, int64_t max_partials) {
  if (block_table.ndim() != 2) throw py::value_error("block_table must have two dimensions");
  const py::ssize_t num_rows = block_table.shape(0);
  check_shape(query_start_loc, "query_start_loc", {num_rows + 1});
  check_shape(prompt_lens, "prompt_lens", {num_rows});
  check_shape(response_lens, "response_lens", {num_rows});
  check_shape(response_block_start, "response_block_start", {num_rows});
  static_assert(sizeof(WorkItem) == 6 * sizeof(int32_t));
  if (items.ndim() != 2) throw py::value_error("items must have two dimensions");
  check_shape(items, "items", {items.shape(0), 6});
  check_shape(token_rows, "token_rows", {token_rows.size()});
  check_shape(partial_starts, "partial_starts", {token_rows.size() + 1});

  const AttentionRows rows{block_table.data(),          query_start_loc.data(),
                           prompt_lens.data(),          response_lens.data(),
                           response_block_start.data(), num_rows,
                           block_table.shape(1),        token_rows.size()};
  WorkList list{};
  list.items = reinterpret_cast<WorkItem*>(items.mutable_data());
  list.token_rows = token_rows.mutable_data();
  list.partial_starts = partial_starts.mutable_data();
  list.max_items = items.shape(0);
  list.max_partials = max_partials;
  {
    py::gil_scoped_release release;
    build_work_list(rows, {tile_tokens, run_blocks, min_shared_rows, min_shared_tokens}, &list);
  }
  return py::make_tuple(list.num_items, list.num_partials);
}

}  // namespace

void bind_work_list(py::module_& m) {
  m.def("build_work_list", &build, py::kw_only(), py::arg("block_table"),
        py::arg("query_start_loc"), py::arg("prompt_lens"), py::arg("response_lens"),
        py::arg("response_block_start"), py::arg("tile_tokens"), py::arg("run_blocks"),
        py::arg("min_shared_rows"), py::arg("min_shared_tokens"), py::arg("items").noconvert(),
        py::arg("token_rows").noconvert(), py::arg("partial_starts").noconvert(),
        py::arg("max_partials"),
        "Fills items [max_items, 6], token_rows [T] and partial_starts [T + 1]; returns "
        "(num_items, num_partials). See csrc/scheduler/work_list.h.");
}

}  // namespace ivg::bindings
