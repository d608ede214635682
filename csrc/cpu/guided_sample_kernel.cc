// SPDX-License-Identifier: Apache-2.0
// guided_sample: z = base + weight * (tuned - untuned), filters, one inverse-CDF draw, measures.
//
// Stage 1 reads the rows once and leaves, for each block of 1024 entries, the maximum and the sum
// of exponentials of z, base, tuned and untuned. Stage 2 merges them, picks a block with the
// uniform and scans that block alone. Filters keep z in scratch and turn into one threshold on it.
#include <omp.h>

#include "cpu/logits.h"
#include "cpu/sample_filter.h"

namespace ivg::cpu {

namespace {

enum Quantity { kZ = 0, kBase = 1, kTuned = 2, kUntuned = 3 };

struct Group {
  const GuidedSampleArgs* args;
  const SampleParams* params;  // of the first sample; all samples of the group agree
  float* stats;                // maxima of each quantity, then sums of each
  float* filter;               // a worker's scratch, null where the group has no filter
  int64_t begin, end;          // samples

  float* maxima(int q) const { return stats + q * padded_blocks(args->vocab_size); }
  float* sums(int q) const { return stats + (4 + q) * padded_blocks(args->vocab_size); }
  int64_t filter_array_size() const { return num_blocks(args->vocab_size) * kVocabBlock; }
  float* filter_array(int i) const { return filter + i * filter_array_size(); }
  float* lane_max() const { return filter_array(kFilterArrays); }
};

float exponent_scale(const SampleParams& p) { return p.inverse_temperature * kLog2e; }

bool has_filter(const SampleParams& p) { return p.top_k > 0 || p.top_p < 1 || p.min_p > 0; }

Group make_group(const GuidedSampleArgs& a, int64_t index, int64_t worker) {
  const int64_t begin = a.group_begins[index];
  const int64_t blocks = num_blocks(a.vocab_size);
  const int64_t worker_size = blocks * (kVocabBlock * kFilterArrays + kLanesPerBlock);
  const bool filtered = a.has_filters && has_filter(a.samples[begin]);
  return {&a,
          a.samples + begin,
          a.stats + index * kStatsPerBlock * padded_blocks(a.vocab_size),
          filtered ? a.filters + worker * worker_size : nullptr,
          begin,
          a.group_begins[index + 1]};
}

// z of a block without bans; -inf in tuned or untuned excludes a token.
template <bool kHasUntuned>
void combine(const float* b, const float* t, const float* u, float weight, int64_t padded,
             float* z) {
  const VecF w = splat(weight);
  for (int64_t i = 0; i < padded; i += kWidth) {
    const VecF vt = load(t + i);
    VecF least = vt;
    VecF d = vt;
    if (kHasUntuned) {
      const VecF vu = load(u + i);
      least = vmin(vt, vu);
      d = vt - vu;
    }
    const VecF combined = w * d + load(b + i);
    store(z + i, least == kNegInf ? splat(kNegInf) : combined);
  }
}

struct Block {
  const float* input[3];  // base, tuned, untuned; null where absent
  const float* z;
  bool is_base;  // z is base itself
  int64_t size;
  int64_t padded;
};

struct Buffers {
  alignas(64) float input[3][kVocabBlock];
  alignas(64) float z[kVocabBlock];
};

Block read_block(const Group& g, int64_t j, Buffers* buffers) {
  const GuidedSampleArgs& a = *g.args;
  const int64_t begin = j * kVocabBlock;
  Block block{};
  block.size = block_size(a.vocab_size, j);
  block.padded = round_to_step(block.size);
  const LogitRows* sources[3] = {&a.base, &a.tuned, &a.untuned};
  for (int q = 0; q < 3; ++q) {
    if (sources[q]->data == nullptr) continue;
    block.input[q] = load_block(*sources[q], g.params->row, begin, block.size, buffers->input[q]);
  }
  const float weight = g.params->weight;
  const float* base = block.input[0];
  block.is_base = block.input[1] == nullptr || weight == 0;
  if (block.is_base) {
    block.z = base;
  } else {
    if (block.input[2] != nullptr) {
      combine<true>(base, block.input[1], block.input[2], weight, block.padded, buffers->z);
    } else {
      combine<false>(base, block.input[1], nullptr, weight, block.padded, buffers->z);
    }
    block.z = buffers->z;
  }
  for (int64_t m = 0; m < g.params->num_banned; ++m) {
    const int64_t at = g.params->banned[m] - begin;
    if (at < 0 || at >= block.size) continue;
    if (block.z == base) {
      memcpy(buffers->z, base, static_cast<size_t>(block.padded) * sizeof(float));
      block.z = buffers->z;
      block.is_base = false;
    }
    buffers->z[at] = kNegInf;
  }
  return block;
}

void measure_block(const Group& g, int64_t j) {
  Buffers buffers;
  const Block block = read_block(g, j, &buffers);
  const LogitRows* sources[3] = {&g.args->base, &g.args->tuned, &g.args->untuned};
  const float* x[4] = {block.z, block.input[0], block.input[1], block.input[2]};
  // All maxima before all sums: the ends of their dependency chains then overlap.
  for (int q = 0; q < 4; ++q) {
    if (x[q] == nullptr) continue;
    const VecF lanes = lane_maxima(x[q], block.padded);
    if (q == kZ && g.filter != nullptr) store(g.lane_max() + j * kLanesPerBlock, lanes);
    g.maxima(q)[j] = tree_max(lanes);
  }
  const float scale = exponent_scale(*g.params);
  const bool is_same = block.is_base && scale == kLog2e;
  for (int q = is_same ? kBase : kZ; q < 4; ++q) {
    if (x[q] == nullptr) continue;
    const char* ahead =
        q == kZ ? nullptr : address(*sources[q - 1], g.params->row, (j + 1) * kVocabBlock);
    g.sums(q)[j] = sum_exp2(x[q], block.padded, g.maxima(q)[j], q == kZ ? scale : kLog2e, ahead);
  }
  if (is_same) g.sums(kZ)[j] = g.sums(kBase)[j];
  if (g.filter != nullptr) {
    memcpy(g.filter_array(0) + j * kVocabBlock, block.z,
           static_cast<size_t>(block.padded) * sizeof(float));
  }
}

// The first entry whose cumulative mass exceeds the target; the last that has mass where rounding
// leaves none.
int64_t scan(const float* mass, int64_t padded, double target) {
  double before = 0;
  int64_t last = 0;
  for (int64_t step = 0; step < padded; step += kStep) {
    VecF total = VecF{};
    for (int k = 0; k < kVecsPerStep; ++k) total += load(mass + step + k * kWidth);
    const double sum = hsum(total);
    // A margin, so that a step whose own order of addition just reaches the target is looked at.
    if (before + sum * (1 + 1e-6) > target) {
      double cumulative = before;
      for (int64_t i = step; i < step + kStep; ++i) {
        cumulative += mass[i];
        if (cumulative > target) return i;
      }
    }
    if (sum > 0) {
      for (int64_t i = step; i < step + kStep; ++i) last = mass[i] > 0 ? i : last;
    }
    before += sum;
  }
  return last;
}

// What a group draws from: tokens with z >= threshold, mass 2^((z - max) * scale). Either they are
// listed in the filter scratch, or each block's mass stands where the sums of z stood.
struct Distribution {
  float max;
  double total;
  float threshold;
  bool is_listed;
  int64_t num_listed;
};

struct Drawn {
  int64_t token;
  float z;
};

FilterRow filter_row(const Group& g, const Merged& z) {
  return {g.filter_array(0),
          g.maxima(kZ),
          g.lane_max(),
          g.args->vocab_size,
          z.max,
          z.sum,
          exponent_scale(*g.params),
          g.filter_array(1),
          g.filter_array(2),
          reinterpret_cast<int32_t*>(g.filter_array(3))};
}

// Mass of the entries >= threshold, written to `mass` if that is not null.
double block_mass(const Group& g, const Distribution& d, const float* z, int64_t padded,
                  float* mass) {
  const float scale = exponent_scale(*g.params);
  VecF total = VecF{};
  for (int64_t i = 0; i < padded; i += kWidth) {
    const VecF v = load(z + i);
    VecF e = vexp2((v - d.max) * scale);
    e = v >= d.threshold ? e : VecF{};
    total += e;
    if (mass != nullptr) store(mass + i, e);
  }
  return hsum(total);
}

Distribution apply_filters(const Group& g, const Merged& z) {
  const SampleParams& p = *g.params;
  Distribution d{z.max, z.sum, kNegInf, false, 0};
  if (g.filter == nullptr) return d;
  const FilterRow row = filter_row(g, z);
  float threshold = kNegInf;
  d.is_listed = p.top_k > 0;
  if (d.is_listed) {
    threshold = top_k_threshold(row, p.top_k);
    if (p.top_p < 1) {
      const int64_t n = collect<false>(row, threshold, z.max);
      threshold = top_p_of_list(row, n, p.top_p);
    }
  } else if (p.top_p < 1) {
    threshold = top_p_threshold(row, p.top_p);
  }
  if (p.min_p > 0) {
    const float least = z.max + static_cast<float>(__builtin_log(p.min_p)) * p.temperature;
    threshold = least > threshold ? least : threshold;
  }
  d.threshold = threshold;
  d.total = 0;
  if (d.is_listed) {
    d.num_listed = collect<false>(row, threshold, z.max);
    d.total = masses_of_list(row, d.num_listed);
    return d;
  }
  const int64_t blocks = num_blocks(g.args->vocab_size);
  for (int64_t j = 0; j < blocks; ++j) {
    float mass = 0;
    if (g.maxima(kZ)[j] >= threshold) {
      const int64_t padded = round_to_step(block_size(g.args->vocab_size, j));
      mass = static_cast<float>(block_mass(g, d, row.z + j * kVocabBlock, padded, nullptr));
    }
    g.sums(kZ)[j] = mass;
    d.total += mass;
  }
  return d;
}

Drawn draw_greedy(const Group& g, float max) {
  int64_t j = 0;
  while (g.maxima(kZ)[j] != max) ++j;
  Buffers buffers;
  const Block block = read_block(g, j, &buffers);
  int64_t i = 0;
  while (block.z[i] != max) ++i;
  return {j * kVocabBlock + i, max};
}

Drawn draw_listed(const Group& g, const Distribution& d, double target) {
  const float* mass = g.filter_array(2);
  const int32_t* ids = reinterpret_cast<const int32_t*>(g.filter_array(3));
  double cumulative = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < d.num_listed; ++i) {
    if (!(mass[i] > 0)) continue;
    last = i;
    cumulative += mass[i];
    if (cumulative > target) break;
  }
  return {ids[last], g.filter_array(1)[last]};
}

Drawn draw_from_blocks(const Group& g, const Distribution& d, double target) {
  const float* shares = g.sums(kZ);
  int64_t chosen = 0;
  double before = 0;
  double cumulative = 0;
  for (int64_t j = 0; j < num_blocks(g.args->vocab_size); ++j) {
    if (!(shares[j] > 0)) continue;
    chosen = j;
    before = cumulative;
    cumulative += shares[j];
    if (cumulative > target) break;
  }
  Buffers buffers;
  const float* z = nullptr;
  if (g.filter != nullptr) {
    z = g.filter_array(0) + chosen * kVocabBlock;
  } else {
    z = read_block(g, chosen, &buffers).z;
  }
  const int64_t padded = round_to_step(block_size(g.args->vocab_size, chosen));
  alignas(64) float mass[kVocabBlock];
  block_mass(g, d, z, padded, mass);
  const int64_t i = scan(mass, padded, target - before);
  return {chosen * kVocabBlock + i, z[i]};
}

bool is_number(double x) { return x - x == 0; }

void finish_group(const Group& g) {
  const GuidedSampleArgs& a = *g.args;
  const SampleParams& p = *g.params;
  const int64_t blocks = num_blocks(a.vocab_size);
  const LogitRows* sources[3] = {&a.base, &a.tuned, &a.untuned};
  Merged merged[4] = {};
  merged[kZ] = merge_blocks(g.maxima(kZ), g.sums(kZ), blocks, exponent_scale(p), g.sums(kZ));
  bool valid = merged[kZ].max > kNegInf && is_number(merged[kZ].sum);
  for (int q = 0; q < 3; ++q) {
    if (sources[q]->data == nullptr) continue;
    merged[kBase + q] =
        merge_blocks(g.maxima(kBase + q), g.sums(kBase + q), blocks, kLog2e, nullptr);
    valid = valid && is_number(merged[kBase + q].sum);
  }
  if (!valid) {
    for (int64_t i = g.begin; i < g.end; ++i) {
      a.token_ids[i] = -1;
      a.logprob[i] = a.base_logprob[i] = a.implicit_reward[i] = a.value[i] = __builtin_nanf("");
      a.valid[i] = false;
    }
    return;
  }
  const Distribution d = apply_filters(g, merged[kZ]);
  const double log_total = __builtin_log(d.total);
  for (int64_t i = g.begin; i < g.end; ++i) {
    const double target = a.samples[i].uniform * d.total;
    const Drawn drawn = p.greedy      ? draw_greedy(g, d.max)
                        : d.is_listed ? draw_listed(g, d, target)
                                      : draw_from_blocks(g, d, target);
    double logit[3] = {};
    for (int q = 0; q < 3; ++q) {
      if (sources[q]->data != nullptr) logit[q] = logit_at(*sources[q], p.row, drawn.token);
    }
    const bool is_pair = a.untuned.data != nullptr;
    const double value = logit[1] - logit[2];
    const double scaled = (static_cast<double>(drawn.z) - d.max) /
                          (p.greedy ? 1.0 : static_cast<double>(p.temperature));
    a.token_ids[i] = drawn.token;
    a.logprob[i] = static_cast<float>(scaled - log_total);
    a.base_logprob[i] = static_cast<float>(logit[0] - log_normaliser(merged[kBase]));
    a.implicit_reward[i] = is_pair ? static_cast<float>(value - (log_normaliser(merged[kTuned]) -
                                                                 log_normaliser(merged[kUntuned])))
                                   : 0.0f;
    a.value[i] = static_cast<float>(value);
    a.valid[i] = true;
  }
}

}  // namespace

void IVG_KERNEL(guided_sample)(const GuidedSampleArgs& a) {
  const int64_t blocks = num_blocks(a.vocab_size);
  const int64_t num_tensors = 1 + (a.tuned.data != nullptr) + (a.untuned.data != nullptr);
  const int threads = useful_threads(a.num_groups * a.vocab_size * num_tensors, a.num_threads);
  // A worker that keeps z of whole rows in its cache takes whole rows, unless they are too few.
  if (a.has_filters && a.num_groups >= threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t index = 0; index < a.num_groups; ++index) {
      const Group g = make_group(a, index, omp_get_thread_num());
      for (int64_t j = 0; j < blocks; ++j) measure_block(g, j);
      finish_group(g);
    }
    return;
  }
  const int64_t items = (blocks + kBlocksPerItem - 1) / kBlocksPerItem;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.num_groups * items; ++item) {
      const Group g = make_group(a, item / items, item / items);
      const int64_t begin = item % items * kBlocksPerItem;
      const int64_t end = begin + kBlocksPerItem < blocks ? begin + kBlocksPerItem : blocks;
      for (int64_t j = begin; j < end; ++j) measure_block(g, j);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < a.num_groups; ++index) {
      finish_group(make_group(a, index, index));
    }
  }
}

}  // namespace ivg::cpu
