// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ivg::bindings {

// Memory kept between calls: it grows to the largest that was asked for. Use one a thread.
class Arena {
 public:
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    memory_.reset();
    capacity_ = 0;
    memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, round(bytes))));
    if (memory_ == nullptr) throw std::bad_alloc();
    capacity_ = round(bytes);
  }

  template <typename T>
  static size_t bytes(int64_t count) {
    return round(static_cast<size_t>(count) * sizeof(T));
  }

  template <typename T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += bytes<T>(count);
    return at;
  }

 private:
  static constexpr size_t kAlignment = 64;
  static size_t round(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

}  // namespace ivg::bindings
