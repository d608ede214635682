// SPDX-License-Identifier: Apache-2.0
// Rows of logits, block by block, and sums of their exponentials.
//
// Only *_kernel.cc files include this: everything has internal linkage.
#pragma once

#include "cpu/vec.h"

namespace {

using ivg::cpu::DType;
using ivg::cpu::kBlocksPerItem;
using ivg::cpu::kLanesPerBlock;
using ivg::cpu::kVocabBlock;
using ivg::cpu::LogitRows;

// Sums take 64 entries at a time by a tree, so that every instruction set rounds about alike.
constexpr int kStep = 64;
constexpr int kVecsPerStep = kStep / kWidth;

// Below this many logits a second thread costs more than it saves.
constexpr int64_t kLogitsPerThread = 1 << 15;

inline VecF vmin(VecF a, VecF b) { return a < b ? a : b; }

inline int64_t num_blocks(int64_t vocab_size) {
  return (vocab_size + kVocabBlock - 1) / kVocabBlock;
}
inline int64_t padded_blocks(int64_t vocab_size) { return (num_blocks(vocab_size) + 15) / 16 * 16; }
inline int64_t block_size(int64_t vocab_size, int64_t block) {
  const int64_t left = vocab_size - block * kVocabBlock;
  return left < kVocabBlock ? left : kVocabBlock;
}
inline int64_t round_to_step(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

inline int useful_threads(int64_t num_logits, int32_t num_threads) {
  const int64_t useful = num_logits / kLogitsPerThread + 1;
  return static_cast<int>(useful < num_threads ? useful : num_threads);
}

inline float logit_at(const LogitRows& x, int64_t row, int64_t i) {
  const int64_t at = row * x.row_stride + i;
  if (x.dtype == DType::kFloat32) return static_cast<const float*>(x.data)[at];
  const uint16_t half = static_cast<const uint16_t*>(x.data)[at];
  return x.dtype == DType::kBFloat16 ? bf16_to_float(half) : fp16_to_float(half);
}

// `size` entries of a row from `begin` as floats, followed by -inf up to a multiple of kStep: where
// they lie, or in `buffer` if they must be converted or padded.
inline const float* load_block(const LogitRows& x, int64_t row, int64_t begin, int64_t size,
                               float* buffer) {
  const int64_t at = row * x.row_stride + begin;
  const int64_t padded = round_to_step(size);
  if (x.dtype == DType::kFloat32) {
    const float* p = static_cast<const float*>(x.data) + at;
    if (padded == size) return p;
    memcpy(buffer, p, static_cast<size_t>(size) * sizeof(float));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
    const bool is_bf16 = x.dtype == DType::kBFloat16;
    const int64_t whole = size / kWidth * kWidth;
    if (is_bf16) {
      for (int64_t i = 0; i < whole; i += kWidth) store(buffer + i, load_bf16(p + i));
    } else {
      for (int64_t i = 0; i < whole; i += kWidth) store(buffer + i, load_fp16(p + i));
    }
    for (int64_t i = whole; i < size; ++i) {
      buffer[i] = is_bf16 ? bf16_to_float(p[i]) : fp16_to_float(p[i]);
    }
  }
  for (int64_t i = size; i < padded; ++i) buffer[i] = kNegInf;
  return buffer;
}

// The maximum; NaN does not count.
inline float block_max(const float* x, int64_t padded) {
  VecF top = splat(kNegInf);
  for (int64_t i = 0; i < padded; i += kWidth) top = vmax(load(x + i), top);
  return hmax(top);
}

// sum of exp((x - max) * scale): 0 where all are -inf, NaN where one is NaN or +inf.
template <bool kScaled>
inline float sum_exp(const float* x, int64_t padded, float max, float scale) {
  const VecF shift = splat(max == kNegInf ? 0.0f : max);
  VecF total = VecF{};
  for (int64_t i = 0; i < padded; i += kStep) {
    VecF e[kVecsPerStep];
    for (int k = 0; k < kVecsPerStep; ++k) {
      const VecF d = load(x + i + k * kWidth) - shift;
      e[k] = vexp(kScaled ? d * scale : d);
    }
    for (int half = kVecsPerStep / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) e[k] += e[k + half];
    }
    total += e[0];
  }
  return hsum(total);
}

// A row's blocks merged: max, and the sum of exp((x - max) * scale). `shares` (null, or
// `sums` itself) gets each block's part of the sum.
struct Merged {
  float max;
  double sum;
};

inline Merged merge_blocks(const float* maxima, const float* sums, int64_t blocks, float scale,
                           float* shares) {
  float max = kNegInf;
  for (int64_t j = 0; j < blocks; ++j) max = maxima[j] > max ? maxima[j] : max;
  const VecF shift = splat(max == kNegInf ? 0.0f : max);
  double sum = 0;
  for (int64_t j = 0; j < blocks; j += kWidth) {
    const int64_t n = blocks - j < kWidth ? blocks - j : kWidth;
    VecF m = splat(kNegInf);
    memcpy(&m, maxima + j, static_cast<size_t>(n) * sizeof(float));
    const VecF factors = vexp((m - shift) * scale);
    for (int64_t k = 0; k < n; ++k) {
      const float share = sums[j + k] * factors[k];
      sum += share;
      if (shares != nullptr) shares[j + k] = share;
    }
  }
  return {max, sum};
}

inline double log_normaliser(const Merged& m) { return m.max + __builtin_log(m.sum); }

}  // namespace
