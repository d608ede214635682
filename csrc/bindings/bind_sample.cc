// SPDX-License-Identifier: Apache-2.0
// guided_sample and token_logprobs for the CPU. Logits and outputs come as addresses; what there is
// one of a sample comes as a Python number, a numpy array or a CPU tensor.
//
// These functions accept or decline: false means that an argument is out of range or in a form that
// they do not know, and the Python side then finds the words for it (or the form).
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstring>

#include "bindings/arena.h"
#include "bindings/bind.h"
#include "bindings/numbers.h"
#include "cpu/kernels.h"
#include "cpu/philox.h"

namespace ivg::bindings {

namespace {

using cpu::DType;
using cpu::LogitRows;
using cpu::SampleParams;

// (address, row stride in elements, dtype code), or None.
LogitRows logit_rows(const py::object& tuple) {
  if (tuple.is_none()) return {nullptr, 0, DType::kFloat32};
  const auto parts = py::reinterpret_borrow<py::tuple>(tuple);
  return {reinterpret_cast<const void*>(parts[0].cast<uintptr_t>()), parts[1].cast<int64_t>(),
          static_cast<DType>(parts[2].cast<int32_t>())};
}

int64_t padded_blocks(int64_t vocab_size) {
  const int64_t blocks = (vocab_size + cpu::kVocabBlock - 1) / cpu::kVocabBlock;
  return (blocks + 15) / 16 * 16;
}

bool is_word(int64_t x) { return x >= 0 && x < (int64_t{1} << 32); }

bool same_but_draw(const SampleParams& a, const SampleParams& b) {
  return a.row == b.row && a.weight == b.weight && a.temperature == b.temperature &&
         a.top_k == b.top_k && a.top_p == b.top_p && a.min_p == b.min_p &&
         a.num_banned == b.num_banned &&
         std::memcmp(a.banned, b.banned, static_cast<size_t>(a.num_banned) * sizeof(int32_t)) == 0;
}

struct SamplingInputs {
  Numbers weight, temperature, top_k, top_p, min_p;
  Numbers seeds, candidate_ids, positions, rows, banned_ids, banned_until;
  bool has_rows, has_bans, has_until;
};

// False where a value is out of range.
bool read_sample(const SamplingInputs& in, int64_t i, int64_t num_rows, int64_t vocab_size,
                 float min_temperature, int32_t* banned, SampleParams* p) {
  const int64_t candidate_id = in.candidate_ids.integer(i);
  const int64_t position = in.positions.integer(i);
  p->row = in.has_rows ? in.rows.integer(i) : i;
  p->weight = in.weight.real(i);
  p->temperature = in.temperature.real(i);
  p->top_k = in.top_k.integer(i);
  p->top_p = in.top_p.real(i);
  p->min_p = in.min_p.real(i);
  if (!is_word(candidate_id) || !is_word(position) || p->row < 0 || p->row >= num_rows ||
      !std::isfinite(p->weight) || !std::isfinite(p->temperature) ||
      !(p->temperature == 0 || p->temperature >= min_temperature) || p->top_k < -1 ||
      !(p->top_p > 0 && p->top_p <= 1) || !(p->min_p >= 0 && p->min_p <= 1)) {
    return false;
  }
  p->uniform =
      cpu::addressed_uniform(static_cast<uint64_t>(in.seeds.integer(i)),
                             static_cast<uint32_t>(candidate_id), static_cast<uint32_t>(position));
  p->greedy = p->temperature == 0;
  p->inverse_temperature = p->greedy ? 1.0f : static_cast<float>(1.0 / p->temperature);
  if (p->greedy || p->top_k < 0 || p->top_k >= vocab_size) p->top_k = 0;
  if (p->greedy) {
    p->top_p = 1;
    p->min_p = 0;
  }
  p->banned = banned;
  p->num_banned = 0;
  const bool is_banning = !in.has_until || position < in.banned_until.integer(i);
  for (int64_t j = 0; j < in.banned_ids.columns(); ++j) {
    const int64_t id = in.banned_ids.integer(i, j);
    if (id < -1 || id >= vocab_size) return false;
    if (id >= 0 && is_banning) banned[p->num_banned++] = static_cast<int32_t>(id);
  }
  return true;
}

bool guided_sample(const py::object& base, const py::object& tuned, const py::object& untuned,
                   int64_t num_rows, int64_t vocab_size, int64_t num_samples,
                   const py::object& rows, const py::object& weight, const py::object& temperature,
                   const py::object& top_k, const py::object& top_p, const py::object& min_p,
                   const py::object& seeds, const py::object& candidate_ids,
                   const py::object& positions, const py::object& banned_ids,
                   const py::object& banned_until, float min_temperature,
                   const std::array<uintptr_t, 6>& outputs, int32_t num_threads) {
  SamplingInputs in;
  in.has_rows = !rows.is_none();
  in.has_bans = !banned_ids.is_none();
  in.has_until = !banned_until.is_none();
  const int64_t n = num_samples;
  if (!in.weight.parse(weight, n) || !in.temperature.parse(temperature, n) ||
      !in.top_k.parse(top_k, n) || !in.top_p.parse(top_p, n) || !in.min_p.parse(min_p, n) ||
      !in.seeds.parse(seeds, n) || !in.candidate_ids.parse(candidate_ids, n) ||
      !in.positions.parse(positions, n) || (in.has_rows && !in.rows.parse(rows, n)) ||
      (in.has_bans && !in.banned_ids.parse(banned_ids, n, true)) ||
      (in.has_until && (!in.has_bans || !in.banned_until.parse(banned_until, n)))) {
    return false;
  }
  if (!in.top_k.is_integer() || !in.seeds.is_integer() || !in.candidate_ids.is_integer() ||
      !in.positions.is_integer() || (in.has_rows && !in.rows.is_integer()) ||
      (in.has_bans && !in.banned_ids.is_integer()) ||
      (in.has_until && !in.banned_until.is_integer())) {
    return false;
  }
  thread_local Arena sample_arena;
  thread_local Arena filter_arena;
  const int64_t blocks = padded_blocks(vocab_size);
  const int64_t num_bans = n * in.banned_ids.columns();
  sample_arena.reserve(Arena::bytes<SampleParams>(n) + Arena::bytes<int64_t>(n + 1) +
                       Arena::bytes<int32_t>(num_bans) +
                       Arena::bytes<float>(n * cpu::kStatsPerBlock * blocks));
  auto* samples = sample_arena.take<SampleParams>(n);
  auto* group_begins = sample_arena.take<int64_t>(n + 1);
  auto* banned = sample_arena.take<int32_t>(num_bans);

  cpu::GuidedSampleArgs args{};
  args.base = logit_rows(base);
  args.tuned = logit_rows(tuned);
  args.untuned = logit_rows(untuned);
  args.vocab_size = vocab_size;
  args.samples = samples;
  args.group_begins = group_begins;
  args.stats = sample_arena.take<float>(n * cpu::kStatsPerBlock * blocks);
  for (int64_t i = 0; i < n; ++i) {
    SampleParams& p = samples[i];
    if (!read_sample(in, i, num_rows, vocab_size, min_temperature,
                     banned + i * in.banned_ids.columns(), &p)) {
      return false;
    }
    if (i == 0 || !same_but_draw(samples[i - 1], p)) group_begins[args.num_groups++] = i;
    args.has_filters |= p.top_k > 0 || p.top_p < 1 || p.min_p > 0;
  }
  group_begins[args.num_groups] = n;
  if (args.has_filters) {
    const int64_t size = cpu::kVocabBlock * cpu::kFilterArrays + cpu::kLanesPerBlock;
    const int64_t workers = args.num_groups < num_threads ? args.num_groups : num_threads;
    filter_arena.reserve(Arena::bytes<float>(workers * blocks * size));
    args.filters = filter_arena.take<float>(workers * blocks * size);
  }
  args.token_ids = reinterpret_cast<int64_t*>(outputs[0]);
  args.logprob = reinterpret_cast<float*>(outputs[1]);
  args.base_logprob = reinterpret_cast<float*>(outputs[2]);
  args.implicit_reward = reinterpret_cast<float*>(outputs[3]);
  args.value = reinterpret_cast<float*>(outputs[4]);
  args.valid = reinterpret_cast<bool*>(outputs[5]);
  args.num_threads = num_threads;
  const py::gil_scoped_release release;
  cpu::kernels().guided_sample(args);
  return true;
}

bool token_logprobs(const py::object& logits, const py::object& minus, int64_t num_rows,
                    int64_t vocab_size, int64_t num_tokens, const py::object& token_ids,
                    const py::object& rows, uintptr_t out, int32_t num_threads) {
  const int64_t n = num_tokens;
  const bool has_rows = !rows.is_none();
  Numbers ids;
  Numbers row_numbers;
  if (!ids.parse(token_ids, n) || !ids.is_integer()) return false;
  if (has_rows && (!row_numbers.parse(rows, n) || !row_numbers.is_integer())) return false;
  thread_local Arena arena;
  const int64_t stats_size = n * 4 * padded_blocks(vocab_size);
  arena.reserve(3 * Arena::bytes<int64_t>(n) + Arena::bytes<float>(stats_size));
  auto* row_of = arena.take<int64_t>(n);
  auto* id_of = arena.take<int64_t>(n);
  auto* owners = arena.take<int64_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    row_of[i] = has_rows ? row_numbers.integer(i) : i;
    id_of[i] = ids.integer(i);
    owners[i] = i > 0 && row_of[i] == row_of[i - 1] ? owners[i - 1] : i;
    if (row_of[i] < 0 || row_of[i] >= num_rows || id_of[i] < 0 || id_of[i] >= vocab_size) {
      return false;
    }
  }
  cpu::TokenLogprobsArgs args{};
  args.logits = logit_rows(logits);
  args.minus = logit_rows(minus);
  args.vocab_size = vocab_size;
  args.rows = row_of;
  args.token_ids = id_of;
  args.num_tokens = n;
  args.owners = owners;
  args.stats = arena.take<float>(stats_size);
  args.out = reinterpret_cast<float*>(out);
  args.num_threads = num_threads;
  const py::gil_scoped_release release;
  cpu::kernels().token_logprobs(args);
  return true;
}

}  // namespace

void bind_sample(py::module_& m) {
  m.def("guided_sample", &guided_sample);
  m.def("token_logprobs", &token_logprobs);
}

}  // namespace ivg::bindings
