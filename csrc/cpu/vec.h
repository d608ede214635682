// SPDX-License-Identifier: Apache-2.0
// A float vector as wide as the instruction set that is being compiled, on GCC/Clang vector
// extensions.
//
// Only *_kernel.cc files include this. No STL templates here or there: their weak symbols would be
// merged across instruction sets, and a baseline machine could run AVX-512 code.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(IVG_ISA_avx2) || defined(IVG_ISA_avx512)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

namespace {

#if defined(IVG_ISA_avx512)
constexpr int kWidth = 16;
#elif defined(IVG_ISA_avx2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float VecF __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecH __attribute__((vector_size(kWidth * 2)));

constexpr float kNegInf = -__builtin_inff();

inline VecF splat(float x) { return x - VecF{}; }
inline VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }
inline VecF vmax(VecF a, VecF b) { return a > b ? a : b; }

inline VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }

// --- 16-bit floats: stored as uint16_t, computed as float
// ------------------------------------------
inline float bf16_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  if (f != f) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline VecF load_bf16(const uint16_t* p) {
  VecH h;
  memcpy(&h, p, sizeof h);
  VecU bits = __builtin_convertvector(h, VecU) << 16;
  VecF v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

inline void store_bf16(uint16_t* p, VecF v) {
  VecU bits;
  memcpy(&bits, &v, sizeof bits);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40u;
  const VecI is_nan = v != v;
  const VecH h = __builtin_convertvector(is_nan ? quiet : rounded, VecH);
  memcpy(p, &h, sizeof h);
}

inline float fp16_to_float(uint16_t h) {
#if defined(IVG_ISA_avx2) || defined(IVG_ISA_avx512)
  return _cvtsh_ss(h);
#else
  // Place the 15 value bits as a float32 subnormal-safe product: exponent bias 127 - 15 = 112.
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t bits = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  if ((h & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    memcpy(&f, &bits, sizeof f);
  } else {
    memcpy(&f, &bits, sizeof f);
    f *= 0x1p112f;
    memcpy(&bits, &f, sizeof bits);
  }
  bits |= sign;
  memcpy(&f, &bits, sizeof f);
  return f;
#endif
}

inline VecF load_fp16(const uint16_t* p) {
#if defined(IVG_ISA_avx512)
  __m256i h;
  memcpy(&h, p, sizeof h);
  // The plain form trips -Wmaybe-uninitialized inside GCC 12's own header.
  return (VecF)_mm512_maskz_cvtph_ps(0xffff, h);
#elif defined(IVG_ISA_avx2)
  __m128i h;
  memcpy(&h, p, sizeof h);
  return (VecF)_mm256_cvtph_ps(h);
#else
  VecF v;
  for (int i = 0; i < kWidth; ++i) v[i] = fp16_to_float(p[i]);
  return v;
#endif
}

// --- exp
// -------------------------------------------------------------------------------------------
// exp(x) for x <= 88, relative error below 4 ulp; 0 for x < -87.3 (where the result would be
// subnormal) and for -inf; NaN for NaN. Range reduction to |r| <= ln(2)/2, then a degree-5
// polynomial.
inline VecF vexp(VecF x) {
  const VecI underflow = x < -87.3f;
  const VecI is_nan = x != x;
  const VecF clamped = underflow | is_nan ? splat(-87.0f) : x;
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = clamped * 1.44269504f + magic;
  const VecF n = shifted - magic;
  const VecF r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  VecI bits;
  memcpy(&bits, &p, sizeof bits);
  bits += __builtin_convertvector(n, VecI) << 23;
  VecF y;
  memcpy(&y, &bits, sizeof y);
  y = underflow ? VecF{} : y;
  return is_nan ? x : y;
}

inline float hsum(VecF v) {
  float s[kWidth];
  store(s, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

inline float hmax(VecF v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

}  // namespace
