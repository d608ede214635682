// SPDX-License-Identifier: Apache-2.0
// Memory taken before anything changes, so that a call that runs out of it changes nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace ivg {

// Capacity for `size` elements in all; it at least doubles, so that many small steps stay cheap.
template <class T>
void make_room(std::vector<T>* vector, size_t size) {
  if (size > vector->capacity()) vector->reserve(std::max(size, 2 * vector->capacity()));
}

}  // namespace ivg
