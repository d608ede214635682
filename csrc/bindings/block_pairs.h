// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "bindings/bind.h"

namespace ivg::bindings {

// What is wrong with (src, dst) pairs of blocks, as (parameter, value, requirement), or None.
inline py::object find_bad_pair(const int32_t* pairs, int64_t num_pairs, int64_t num_blocks) {
  const auto failure = [](int32_t value, const std::string& requirement) {
    return py::make_tuple("pairs", value, requirement);
  };
  std::vector<int32_t> written;
  written.reserve(static_cast<size_t>(num_pairs));
  for (int64_t i = 0; i < 2 * num_pairs; ++i) {
    if (pairs[i] < 0 || pairs[i] >= num_blocks) {
      return failure(pairs[i], "must hold block ids in [0, " + std::to_string(num_blocks) + ")");
    }
    if (i % 2 == 1) written.push_back(pairs[i]);
  }
  // The copies run in any order, so a block that is written may be neither read nor written again.
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  if (twice != written.end()) return failure(*twice, "must write each block once");
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (std::binary_search(written.begin(), written.end(), pairs[2 * i])) {
      return failure(pairs[2 * i], "must not read a block that is written");
    }
  }
  return py::none();
}

}  // namespace ivg::bindings
