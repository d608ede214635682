// SPDX-License-Identifier: Apache-2.0
// top-k, top-p and min-p as one threshold on z: a token stays if its z is at least that.
//
// Nothing is sorted. Statistics of the blocks bound the threshold, a few passes narrow the bounds,
// and a selection among the survivors ends it.
#pragma once

#include "cpu/logits.h"

namespace {

#if defined(IVG_ISA_avx512)
inline uint32_t mask_ge(VecF a, float b) {
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_GE_OQ);
}
inline uint32_t mask_gt(VecF a, float b) {
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(b), _CMP_GT_OQ);
}
#elif defined(IVG_ISA_avx2)
inline uint32_t mask_ge(VecF a, float b) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(b), _CMP_GE_OQ)));
}
inline uint32_t mask_gt(VecF a, float b) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_set1_ps(b), _CMP_GT_OQ)));
}
#else
inline uint32_t bits_of(VecI mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
}
inline uint32_t mask_ge(VecF a, float b) { return bits_of(a >= b); }
inline uint32_t mask_gt(VecF a, float b) { return bits_of(a > b); }
#endif

// The rows of z that are being filtered: z is padded with -inf to a multiple of kStep.
struct FilterRow {
  const float* z;
  const float* block_max;  // [blocks]
  const float* lane_max;   // [blocks, kLanesPerBlock], the first kWidth of each: the lanes' maxima
  int64_t vocab_size;
  float max;   // of z
  double sum;  // of exp((z - max) * inverse_temperature)
  float inverse_temperature;
  float* list_z;  // three lists that hold vocab_size entries each
  float* list_mass;
  int32_t* list_ids;
};

// The largest t among z[0..n) with above + (mass of {z >= t}) >= wanted; the smallest z where there
// is none. Without `mass` each entry counts 1. Reorders its input. Expected linear time.
inline float select_threshold(float* z, float* mass, int64_t n, double above, double wanted) {
  uint64_t state = 0x9E3779B97F4A7C15u;  // pivots that no input can foresee as a pattern
  int64_t begin = 0;
  int64_t end = n;
  for (;;) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const int64_t span = end - begin;
    const float pivot =
        z[begin + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(span))];
    // [begin, greater) > pivot, [greater, i) == pivot, [lesser, end) < pivot
    int64_t greater = begin;
    int64_t lesser = end;
    double mass_greater = 0;
    double mass_equal = 0;
    for (int64_t i = begin; i < lesser;) {
      const float zi = z[i];
      const float mi = mass != nullptr ? mass[i] : 1.0f;
      if (zi < pivot) {
        --lesser;
        z[i] = z[lesser];
        z[lesser] = zi;
        if (mass != nullptr) {
          mass[i] = mass[lesser];
          mass[lesser] = mi;
        }
        continue;
      }
      if (zi > pivot) {
        z[i] = z[greater];
        z[greater] = zi;
        if (mass != nullptr) {
          mass[i] = mass[greater];
          mass[greater] = mi;
        }
        ++greater;
        mass_greater += mi;
      } else {
        mass_equal += mi;
      }
      ++i;
    }
    if (greater > begin && above + mass_greater >= wanted) {
      end = greater;
    } else if (above + mass_greater + mass_equal >= wanted || lesser == end) {
      return pivot;
    } else {
      above += mass_greater + mass_equal;
      begin = lesser;
    }
  }
}

inline float kth_largest(float* z, int64_t n, int64_t k) {
  return select_threshold(z, nullptr, n, 0.0, static_cast<double>(k));
}

// Entries with low <= z (or low < z where kOpen) and z <= high, in the order of ids, -inf never.
template <bool kOpen>
inline int64_t collect(const FilterRow& row, float low, float high) {
  const bool is_open = kOpen || low == kNegInf;
  int64_t n = 0;
  for (int64_t j = 0; j * kVocabBlock < row.vocab_size; ++j) {
    if (!(is_open ? row.block_max[j] > low : row.block_max[j] >= low)) continue;
    const int64_t begin = j * kVocabBlock;
    const int64_t end = begin + round_to_step(block_size(row.vocab_size, j));
    for (int64_t i = begin; i < end; i += kWidth) {
      const VecF z = load(row.z + i);
      uint32_t mask = (is_open ? mask_gt(z, low) : mask_ge(z, low)) & ~mask_gt(z, high);
      for (; mask != 0; mask &= mask - 1) {
        const int64_t at = i + __builtin_ctz(mask);
        row.list_z[n] = row.z[at];
        row.list_ids[n] = static_cast<int32_t>(at);
        ++n;
      }
    }
  }
  return n;
}

// Fills list_mass and returns its sum.
inline double masses_of_list(const FilterRow& row, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    VecF z = splat(kNegInf);
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    memcpy(&z, row.list_z + i, static_cast<size_t>(left) * sizeof(float));
    const VecF mass = vexp((z - row.max) * row.inverse_temperature);
    memcpy(row.list_mass + i, &mass, static_cast<size_t>(left) * sizeof(float));
    for (int64_t k = 0; k < left; ++k) total += mass[k];
  }
  return total;
}

// The k-th largest z, -inf where fewer may be drawn. Overwrites the lists.
inline float top_k_threshold(const FilterRow& row, int64_t k) {
  const int64_t blocks = num_blocks(row.vocab_size);
  float low = kNegInf;
  if (k <= blocks * kWidth) {
    // The k-th largest of the lanes' maxima is a lower bound, and a close one.
    for (int64_t j = 0; j < blocks; ++j) {
      memcpy(row.list_z + j * kWidth, row.lane_max + j * kLanesPerBlock, sizeof(VecF));
    }
    low = kth_largest(row.list_z, blocks * kWidth, k);
  }
  const int64_t n = collect<false>(row, low, row.max);
  return n >= k ? kth_largest(row.list_z, n, k) : kNegInf;
}

// The smallest z of the set that top-p keeps among the n listed entries. Reorders the lists.
inline float top_p_of_list(const FilterRow& row, int64_t n, float top_p) {
  const double total = masses_of_list(row, n);
  return select_threshold(row.list_z, row.list_mass, n, 0.0, top_p * total);
}

constexpr int kPivots = 8;

// above[k] = mass of {z > pivots[k]}, the pivots in descending order.
inline void masses_above(const FilterRow& row, const float* pivots, double* above) {
  for (int k = 0; k < kPivots; ++k) above[k] = 0;
  for (int64_t j = 0; j * kVocabBlock < row.vocab_size; ++j) {
    if (!(row.block_max[j] > pivots[kPivots - 1])) continue;
    const int64_t begin = j * kVocabBlock;
    const int64_t end = begin + round_to_step(block_size(row.vocab_size, j));
    VecF sums[kPivots] = {};
    for (int64_t i = begin; i < end; i += kWidth) {
      const VecF z = load(row.z + i);
      const VecF mass = vexp((z - row.max) * row.inverse_temperature);
      for (int k = 0; k < kPivots; ++k) sums[k] += z > pivots[k] ? mass : VecF{};
    }
    for (int k = 0; k < kPivots; ++k) above[k] += hsum(sums[k]);
  }
}

// The smallest z of the set that top-p keeps among all entries of the row.
//
// It lies in (low, high]: the mass above low reaches what is wanted, the mass above high does not.
inline float top_p_threshold(const FilterRow& row, float top_p) {
  const double wanted = static_cast<double>(top_p) * row.sum;
  // Distances from the maximum, in units of the temperature; exp(-88) is no float32 mass any more.
  static const float kFirst[kPivots] = {0.5f, 1.0f, 2.0f, 4.0f, 6.0f, 9.0f, 13.0f, 20.0f};
  float low = kNegInf;
  float high = row.max;
  double above_high = 0;
  for (int pass = 0; pass < 4; ++pass) {
    int64_t open = 0;
    for (int64_t j = 0; j * kVocabBlock < row.vocab_size; ++j) open += row.block_max[j] > low;
    if (pass > 0 && (low == kNegInf || open <= 4)) break;
    float pivots[kPivots];
    for (int k = 0; k < kPivots; ++k) {
      pivots[k] = pass == 0 ? row.max - kFirst[k] / row.inverse_temperature
                            : high - (high - low) * (static_cast<float>(k + 1) / (kPivots + 1));
    }
    double above[kPivots];
    masses_above(row, pivots, above);
    for (int k = 0; k < kPivots; ++k) {
      if (above[k] >= wanted) {
        low = pivots[k];
        break;
      }
      high = pivots[k];
      above_high = above[k];
    }
  }
  const int64_t n = collect<true>(row, low, high);
  if (n == 0) return high;
  masses_of_list(row, n);
  return select_threshold(row.list_z, row.list_mass, n, above_high, wanted);
}

}  // namespace
