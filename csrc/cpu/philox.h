// SPDX-License-Identifier: Apache-2.0
// The addressed uniform: Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter =
// (candidate id, position, stream, 0); ivg_fast/ops/philox.py is its twin.
#pragma once

#include <cstdint>

namespace ivg::cpu {

inline double addressed_uniform(uint64_t seed, uint32_t candidate_id, uint32_t position,
                                uint32_t stream = 0) {
  uint32_t c[4] = {candidate_id, position, stream, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(c[0]) * 0xD2511F53u;
    const uint64_t right = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    const uint32_t c0 = static_cast<uint32_t>(right >> 32) ^ c[1] ^ k[0];
    const uint32_t c2 = static_cast<uint32_t>(left >> 32) ^ c[3] ^ k[1];
    c[0] = c0;
    c[1] = static_cast<uint32_t>(right);
    c[2] = c2;
    c[3] = static_cast<uint32_t>(left);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return (c[0] + 0.5) * 0x1p-32;
}

}  // namespace ivg::cpu
