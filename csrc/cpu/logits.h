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

// Sums add up 64 entries before they go to the total: few additions to it, little rounding.
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

// Where an entry lies, and the bytes an entry takes. The address may be past the end of the row.
inline const char* address(const LogitRows& x, int64_t row, int64_t i) {
  const int64_t size = x.dtype == DType::kFloat32 ? 4 : 2;
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(x.data) +
                                       static_cast<uintptr_t>((row * x.row_stride + i) * size));
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

// 2^x for x <= 127: relative error below 3 * 2^-24, exact at integers; 0 for x <= -150 (or already
// from -127 on) and for -inf; NaN for NaN and +inf. The polynomial is the minimax one of degree 5
// on
// [-1/2, 1/2] with constant 1.
//
// N vectors in lockstep: one after another, their dependency chains would fill the schedulers.
template <int N>
inline void vexp2(VecF (&x)[N]) {
  VecF n[N];
  VecF p[N];
  // vmax returns its second operand where one is NaN.
#if defined(IVG_ISA_avx512)
  for (int k = 0; k < N; ++k) x[k] = vmax(splat(-160.0f), x[k]);
  for (int k = 0; k < N; ++k) {
    n[k] = (VecF)_mm512_maskz_roundscale_ps(0xffff, (__m512)x[k], 0);
  }
#else
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int k = 0; k < N; ++k) x[k] = vmax(splat(-127.0f), x[k]);
  for (int k = 0; k < N; ++k) n[k] = (x[k] + magic) - magic;
#endif
  for (int k = 0; k < N; ++k) x[k] -= n[k];
  for (int k = 0; k < N; ++k) p[k] = x[k] * 0x1.5bda4p-10f + 0x1.3ce8acp-7f;
  for (int k = 0; k < N; ++k) p[k] = p[k] * x[k] + 0x1.c6b6d8p-5f;
  for (int k = 0; k < N; ++k) p[k] = p[k] * x[k] + 0x1.ebf9c2p-3f;
  for (int k = 0; k < N; ++k) p[k] = p[k] * x[k] + 0x1.62e42ap-1f;
  for (int k = 0; k < N; ++k) p[k] = p[k] * x[k] + 1.0f;
#if defined(IVG_ISA_avx512)
  for (int k = 0; k < N; ++k) {
    x[k] = (VecF)_mm512_maskz_scalef_ps(0xffff, (__m512)p[k], (__m512)n[k]);
  }
#else
  // At -127 the sum of the exponents has the bits of 0. A NaN has n = NaN, whose integer has no
  // bits but the highest: it stays as it is.
  VecI bits[N];
  memcpy(bits, p, sizeof bits);
  for (int k = 0; k < N; ++k) bits[k] += __builtin_convertvector(n[k], VecI) << 23;
  memcpy(x, bits, sizeof bits);
#endif
}

inline VecF vexp2(VecF x) {
  VecF one[1] = {x};
  vexp2(one);
  return one[0];
}

constexpr float kLog2e = 1.44269504f;

inline float tree_max(VecF v) {
  float s[kWidth];
  store(s, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
  }
  return s[0];
}

// The maxima of the lanes; NaN does not count.
inline VecF lane_maxima(const float* x, int64_t padded) {
  VecF top[4] = {splat(kNegInf), splat(kNegInf), splat(kNegInf), splat(kNegInf)};
  for (int64_t i = 0; i < padded; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) top[k] = vmax(load(x + i + k * kWidth), top[k]);
  }
  return vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
}

// sum of 2^((x - max) * scale): 0 where all are -inf, NaN where one is NaN or +inf. On the way the
// 4 KiB at `ahead`, which the next block reads, are called for: no hardware prefetcher crosses a
// page.
inline float sum_exp2(const float* x, int64_t padded, float max, float scale,
                      const char* ahead = nullptr) {
  const VecF shift = splat(max == kNegInf ? 0.0f : max);
  VecF total = VecF{};
  for (int64_t i = 0; i < padded; i += kStep) {
    VecF step = VecF{};
    if (ahead != nullptr) {
      for (int k = 0; k < 4; ++k) __builtin_prefetch(ahead + i * 4 + k * 64);
    }
    for (int v = 0; v < kVecsPerStep; v += 4) {
      VecF e[4];
      for (int k = 0; k < 4; ++k) e[k] = (load(x + i + (v + k) * kWidth) - shift) * scale;
      vexp2(e);
      step += (e[0] + e[1]) + (e[2] + e[3]);
    }
    total += step;
  }
  return hsum(total);
}

// A row's blocks merged: max, and the sum of 2^((x - max) * scale). `shares` (null, or
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
    const VecF factors = vexp2((m - shift) * scale);
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
