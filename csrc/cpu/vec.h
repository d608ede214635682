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

// Round to nearest even; overflow to infinity; NaN stays NaN.
inline uint16_t float_to_fp16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 puts the unit of fp16 at the last bit of f
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | (bits >> 13));
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

// tanh(x), relative error below 4 ulp: an odd polynomial near zero, 1 - 2 / (exp(2x) + 1)
// elsewhere.
inline VecF vtanh(VecF x) {
  const VecF magnitude = x < 0.0f ? -x : x;
  const VecF square = x * x;
  VecF p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  p = p * square * x + x;
  const VecF clamped = magnitude > 10.0f ? splat(10.0f) : magnitude;
  VecF large = 1.0f - 2.0f / (vexp(clamped + clamped) + 1.0f);
  large = x < 0.0f ? -large : large;
  return magnitude >= 0.625f ? large : p;
}

// --- four by four
typedef float Vec4 __attribute__((vector_size(16)));
#if defined(__clang__)
#define IVG_SHUFFLE(Ints, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Vec4I __attribute__((vector_size(16)));
#define IVG_SHUFFLE(Ints, a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// In each lane of four: (a0 b0 a1 b1), (a2 b2 a3 b3), (a0 a1 b0 b1), (a2 a3 b2 b3).
#if defined(IVG_ISA_avx512)
#define IVG_UNPACK_LO(a, b) \
  IVG_SHUFFLE(VecI, a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define IVG_UNPACK_HI(a, b) \
  IVG_SHUFFLE(VecI, a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define IVG_JOIN_LO(a, b) \
  IVG_SHUFFLE(VecI, a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define IVG_JOIN_HI(a, b) \
  IVG_SHUFFLE(VecI, a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif defined(IVG_ISA_avx2)
#define IVG_UNPACK_LO(a, b) IVG_SHUFFLE(VecI, a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define IVG_UNPACK_HI(a, b) IVG_SHUFFLE(VecI, a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define IVG_JOIN_LO(a, b) IVG_SHUFFLE(VecI, a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define IVG_JOIN_HI(a, b) IVG_SHUFFLE(VecI, a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define IVG_UNPACK_LO(a, b) IVG_SHUFFLE(VecI, a, b, 0, 4, 1, 5)
#define IVG_UNPACK_HI(a, b) IVG_SHUFFLE(VecI, a, b, 2, 6, 3, 7)
#define IVG_JOIN_LO(a, b) IVG_SHUFFLE(VecI, a, b, 0, 1, 4, 5)
#define IVG_JOIN_HI(a, b) IVG_SHUFFLE(VecI, a, b, 2, 3, 6, 7)
#endif

// p[0..3] = the sums of a, b, c, d
inline void store_hsum4(float* p, VecF a, VecF b, VecF c, VecF d) {
  const VecF ab = IVG_UNPACK_LO(a, b) + IVG_UNPACK_HI(a, b);
  const VecF cd = IVG_UNPACK_LO(c, d) + IVG_UNPACK_HI(c, d);
  const VecF sums = IVG_JOIN_LO(ab, cd) + IVG_JOIN_HI(ab, cd);
  Vec4 lanes[kWidth / 4];
  memcpy(lanes, &sums, sizeof lanes);
  for (int half = kWidth / 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  memcpy(p, &lanes[0], sizeof lanes[0]);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j in 0..3
inline void transpose4(const float* from, int from_stride, float* to, int to_stride) {
  Vec4 row[4];
  for (int i = 0; i < 4; ++i) memcpy(&row[i], from + i * from_stride, sizeof row[i]);
  const Vec4 low01 = IVG_SHUFFLE(Vec4I, row[0], row[1], 0, 4, 1, 5);
  const Vec4 high01 = IVG_SHUFFLE(Vec4I, row[0], row[1], 2, 6, 3, 7);
  const Vec4 low23 = IVG_SHUFFLE(Vec4I, row[2], row[3], 0, 4, 1, 5);
  const Vec4 high23 = IVG_SHUFFLE(Vec4I, row[2], row[3], 2, 6, 3, 7);
  const Vec4 column[4] = {IVG_SHUFFLE(Vec4I, low01, low23, 0, 1, 4, 5),
                          IVG_SHUFFLE(Vec4I, low01, low23, 2, 3, 6, 7),
                          IVG_SHUFFLE(Vec4I, high01, high23, 0, 1, 4, 5),
                          IVG_SHUFFLE(Vec4I, high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) memcpy(to + i * to_stride, &column[i], sizeof column[i]);
}

}  // namespace
