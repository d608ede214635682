// SPDX-License-Identifier: Apache-2.0
// Log-probabilities of given tokens: one read of each row, nothing of its size written.
#include "cpu/logits.h"

namespace ivg::cpu {

namespace {

// Where token i's statistics of one source lie: maxima, then sums.
float* stats_of(const TokenLogprobsArgs& a, int64_t i, int source) {
  return a.stats + (i * 2 + source) * 2 * padded_blocks(a.vocab_size);
}

void measure(const TokenLogprobsArgs& a, int64_t i, int64_t j) {
  alignas(64) float buffer[kVocabBlock];
  const int64_t size = block_size(a.vocab_size, j);
  const LogitRows* sources[2] = {&a.logits, &a.minus};
  for (int s = 0; s < 2; ++s) {
    if (sources[s]->data == nullptr) continue;
    const float* x = load_block(*sources[s], a.rows[i], j * kVocabBlock, size, buffer);
    float* stats = stats_of(a, i, s);
    stats[j] = tree_max(lane_maxima(x, round_to_step(size)));
    stats[padded_blocks(a.vocab_size) + j] =
        sum_exp2(x, round_to_step(size), stats[j], kLog2e,
                 address(*sources[s], a.rows[i], (j + 1) * kVocabBlock));
  }
}

double logprob(const TokenLogprobsArgs& a, const LogitRows& source, int64_t i, float* stats) {
  const Merged merged = merge_blocks(stats, stats + padded_blocks(a.vocab_size),
                                     num_blocks(a.vocab_size), kLog2e, nullptr);
  return logit_at(source, a.rows[i], a.token_ids[i]) - log_normaliser(merged);
}

}  // namespace

void IVG_KERNEL(token_logprobs)(const TokenLogprobsArgs& a) {
  const int64_t blocks = num_blocks(a.vocab_size);
  const int64_t items = (blocks + kBlocksPerItem - 1) / kBlocksPerItem;
  const int64_t num_tensors = 1 + (a.minus.data != nullptr);
  const int threads = useful_threads(a.num_tokens * a.vocab_size * num_tensors, a.num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.num_tokens * items; ++item) {
      const int64_t i = item / items;
      if (a.owners[i] != i) continue;
      const int64_t begin = item % items * kBlocksPerItem;
      const int64_t end = begin + kBlocksPerItem < blocks ? begin + kBlocksPerItem : blocks;
      for (int64_t j = begin; j < end; ++j) measure(a, i, j);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.num_tokens; ++i) {
      const int64_t from = a.owners[i];
      double result = logprob(a, a.logits, i, stats_of(a, from, 0));
      if (a.minus.data != nullptr) result -= logprob(a, a.minus, i, stats_of(a, from, 1));
      a.out[i] = static_cast<float>(result);
    }
  }
}

}  // namespace ivg::cpu
