// SPDX-License-Identifier: Apache-2.0
// Attention over the paged cache: online softmax, a tile of queries against segments of key blocks.
//
// A work item is (KV head, tile), a tile up to kMaxTile query vectors: the heads of a GQA group at
// one or several positions of one row, or of neighbouring rows that share their prompt. Each key
// block of the prompt that is loaded serves the whole tile, the response's blocks those of its row.
// Scores of one segment of blocks are formed first, then one softmax update, then the values are
// added, so the bookkeeping of the online softmax is paid once a segment. What a query computes
// depends on its group of rows alone, not on other requests or the number of threads.
#include <stdint.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace ivg::cpu {

namespace {

constexpr int kBlock = 16;
constexpr int kMaxTile = 32;
constexpr int kScoreBudget = 4096;  // floats: query vectors of a tile * keys of a segment
constexpr int kMaxSegment = 32;     // blocks
constexpr int kMaxHead = static_cast<int>(kMaxHeadSize);

// Tiles of at least this many queries transpose the key block, which saves the horizontal sums.
constexpr int kTransposeFrom = 16;

// Products that one running sum takes before it is added to the total; bounds the rounding error.
constexpr int kSumLength = 64;

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 17;

// Register blocks: queries (rows) by vectors of the head size, within 32 or 16 vector registers.
#if defined(IVG_ISA_avx512)
constexpr int kScoreRows = 4;
constexpr int kTransposedRows = 8;
constexpr int kValueVecs = 4;
#else
constexpr int kScoreRows = 2;
constexpr int kTransposedRows = kWidth == 8 ? 4 : 2;
constexpr int kValueVecs = 2;
#endif
constexpr int kValueRows = 4;

struct F32 {
  typedef float Type;
  static VecF load_vec(const float* p) { return load(p); }
  static float to_float(float x) { return x; }
  static float from_float(float x) { return x; }
};
struct BF16 {
  typedef uint16_t Type;
  static VecF load_vec(const uint16_t* p) { return load_bf16(p); }
  static float to_float(uint16_t x) { return bf16_to_float(x); }
  static uint16_t from_float(float x) { return float_to_bf16(x); }
};
struct F16 {
  typedef uint16_t Type;
  static VecF load_vec(const uint16_t* p) { return load_fp16(p); }
  static float to_float(uint16_t x) { return fp16_to_float(x); }
  static uint16_t from_float(float x) { return float_to_fp16(x); }
};

struct Scratch {
  alignas(64) float query[kMaxTile * kMaxHead];
  alignas(64) float acc[kMaxTile * kMaxHead];
  alignas(64) float scores[kScoreBudget];
  alignas(64) float transposed[kMaxHead * kBlock];
  alignas(64) float padded[kBlock * kMaxHead];
  float row_max[kMaxTile];
  float row_sum[kMaxTile];
  int64_t position[kMaxTile];
};

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
int padded_size(int64_t size) { return static_cast<int>((size + kWidth - 1) / kWidth * kWidth); }

// One key block of a row, as a tile sees it.
struct KeyBlock {
  int64_t id;
  int64_t position;  // of its first key
  int num_keys;
};

// Where the keys of a row live: prompt blocks first, then the response's.
struct RowKeys {
  const int32_t* table;
  int64_t prompt_len;
  int64_t response_len;
  int64_t response_block;
  int64_t num_prompt_blocks;

  RowKeys(const PagedAttentionArgs& a, int64_t row)
      : table(a.block_table + row * a.table_width),
        prompt_len(a.prompt_lens[row]),
        response_len(a.response_lens[row]),
        response_block(a.response_block_start[row]),
        num_prompt_blocks((prompt_len + kBlock - 1) / kBlock) {}

  int64_t block_of(int64_t position) const {
    return position < prompt_len ? position / kBlock
                                 : num_prompt_blocks + (position - prompt_len) / kBlock;
  }
  KeyBlock at(int64_t j) const {
    if (j < num_prompt_blocks) {
      return {table[j], j * kBlock, static_cast<int>(min64(kBlock, prompt_len - j * kBlock))};
    }
    const int64_t first = (j - num_prompt_blocks) * kBlock;
    return {table[response_block + j - num_prompt_blocks], prompt_len + first,
            static_cast<int>(min64(kBlock, response_len - first))};
  }
};

// Not `= {}`, which the compiler turns into a memset of the stack.
template <int ROWS, int COLUMNS>
inline void clear(VecF (&acc)[ROWS][COLUMNS]) {
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < COLUMNS; ++j) acc[r][j] = VecF{};
  }
}

// --- scores

// scores[r, key] = query[r] . key[key] for ROWS queries and one block; keys from num_keys on,
// rounded up to four, are left alone.
template <class E, int ROWS>
void score_rows(const typename E::Type* keys, int size, int num_keys, const float* query,
                int query_stride, float* scores, int score_stride) {
  for (int key = 0; key < num_keys; key += 4) {
    const typename E::Type* k = keys + key * size;
    VecF acc[ROWS][4];
    clear(acc);
    for (int i = 0; i < size; i += kWidth) {
      VecF kv[4];
      for (int j = 0; j < 4; ++j) kv[j] = E::load_vec(k + j * size + i);
      for (int r = 0; r < ROWS; ++r) {
        const VecF q = load(query + r * query_stride + i);
        for (int j = 0; j < 4; ++j) acc[r][j] += q * kv[j];
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      store_hsum4(scores + r * score_stride + key, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    }
  }
}

template <class E>
void score_direct(const typename E::Type* keys, int size, int num_keys, const float* query,
                  int query_stride, int num_queries, float* scores, int score_stride) {
  int r = 0;
  for (; r + kScoreRows <= num_queries; r += kScoreRows) {
    score_rows<E, kScoreRows>(keys, size, num_keys, query + r * query_stride, query_stride,
                              scores + r * score_stride, score_stride);
  }
#if defined(IVG_ISA_avx512)
  if (num_queries - r == 3) {
    score_rows<E, 3>(keys, size, num_keys, query + r * query_stride, query_stride,
                     scores + r * score_stride, score_stride);
    return;
  }
  if (num_queries - r == 2) {
    score_rows<E, 2>(keys, size, num_keys, query + r * query_stride, query_stride,
                     scores + r * score_stride, score_stride);
    return;
  }
#endif
  if (num_queries - r == 1) {
    score_rows<E, 1>(keys, size, num_keys, query + r * query_stride, query_stride,
                     scores + r * score_stride, score_stride);
  }
}

// out[i, key] = keys[key, i]
void transpose(const float* keys, int size, int stride, float* out) {
  for (int key = 0; key < kBlock; key += 4) {
    const float* k = keys + key * stride;
    for (int i = 0; i < size; i += 4) {
      transpose4(k + i, stride, out + i * kBlock + key, kBlock);
    }
  }
}

template <int ROWS>
void score_transposed_rows(const float* keys, int size, const float* query, int query_stride,
                           float* scores, int score_stride) {
  constexpr int kVecs = kBlock / kWidth;
  VecF sum[ROWS][kVecs];
  clear(sum);
  for (int begin = 0; begin < size; begin += kSumLength) {
    const int end = begin + kSumLength < size ? begin + kSumLength : size;
    VecF acc[ROWS][kVecs];
    clear(acc);
    for (int i = begin; i < end; ++i) {
      VecF kv[kVecs];
      for (int j = 0; j < kVecs; ++j) kv[j] = load(keys + i * kBlock + j * kWidth);
      for (int r = 0; r < ROWS; ++r) {
        const VecF q = splat(query[r * query_stride + i]);
        for (int j = 0; j < kVecs; ++j) acc[r][j] += q * kv[j];
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int j = 0; j < kVecs; ++j) sum[r][j] += acc[r][j];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < kVecs; ++j) store(scores + r * score_stride + j * kWidth, sum[r][j]);
  }
}

void score_transposed(const float* keys, int size, const float* query, int query_stride,
                      int num_queries, float* scores, int score_stride) {
  int r = 0;
  for (; r + kTransposedRows <= num_queries; r += kTransposedRows) {
    score_transposed_rows<kTransposedRows>(keys, size, query + r * query_stride, query_stride,
                                           scores + r * score_stride, score_stride);
  }
  if (r + kTransposedRows / 2 <= num_queries) {
    score_transposed_rows<kTransposedRows / 2>(keys, size, query + r * query_stride, query_stride,
                                               scores + r * score_stride, score_stride);
    r += kTransposedRows / 2;
  }
  for (; r < num_queries; ++r) {
    score_transposed_rows<1>(keys, size, query + r * query_stride, query_stride,
                             scores + r * score_stride, score_stride);
  }
}

// --- values

// acc[r, 0 : VECS * kWidth] += sum over the segment's keys of p[r, key] * value[key, ...]
template <class E, int ROWS, int VECS>
void add_values_rows(const typename E::Type* const* blocks, const int* first, const int* last,
                     int num_blocks, int size, const float* p, int p_stride, float* acc,
                     int acc_stride) {
  VecF o[ROWS][VECS];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECS; ++v) o[r][v] = load(acc + r * acc_stride + v * kWidth);
  }
  for (int b = 0; b < num_blocks; ++b) {
    for (int key = first[b]; key < last[b]; ++key) {
      VecF value[VECS];
      for (int v = 0; v < VECS; ++v) value[v] = E::load_vec(blocks[b] + key * size + v * kWidth);
      for (int r = 0; r < ROWS; ++r) {
        const VecF weight = splat(p[r * p_stride + b * kBlock + key]);
        for (int v = 0; v < VECS; ++v) o[r][v] += weight * value[v];
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECS; ++v) store(acc + r * acc_stride + v * kWidth, o[r][v]);
  }
}

template <class E, int ROWS>
void add_values_for(const typename E::Type* const* blocks, const int* first, const int* last,
                    int num_blocks, int size, const float* p, int p_stride, float* acc,
                    int acc_stride) {
  const typename E::Type* shifted[kMaxSegment];
  int i = 0;
  for (; i + kValueVecs * kWidth <= size; i += kValueVecs * kWidth) {
    for (int b = 0; b < num_blocks; ++b) shifted[b] = blocks[b] + i;
    add_values_rows<E, ROWS, kValueVecs>(shifted, first, last, num_blocks, size, p, p_stride,
                                         acc + i, acc_stride);
  }
  for (; i < size; i += kWidth) {
    for (int b = 0; b < num_blocks; ++b) shifted[b] = blocks[b] + i;
    add_values_rows<E, ROWS, 1>(shifted, first, last, num_blocks, size, p, p_stride, acc + i,
                                acc_stride);
  }
}

template <class E>
void add_values(const typename E::Type* const* blocks, const int* first, const int* last,
                int num_blocks, int size, const float* p, int p_stride, int num_queries, float* acc,
                int acc_stride) {
  int r = 0;
  for (; r + kValueRows <= num_queries; r += kValueRows) {
    add_values_for<E, kValueRows>(blocks, first, last, num_blocks, size, p + r * p_stride, p_stride,
                                  acc + r * acc_stride, acc_stride);
  }
  p += r * p_stride;
  acc += r * acc_stride;
  switch (num_queries - r) {
    case 3:
      add_values_for<E, 3>(blocks, first, last, num_blocks, size, p, p_stride, acc, acc_stride);
      break;
    case 2:
      add_values_for<E, 2>(blocks, first, last, num_blocks, size, p, p_stride, acc, acc_stride);
      break;
    case 1:
      add_values_for<E, 1>(blocks, first, last, num_blocks, size, p, p_stride, acc, acc_stride);
      break;
    default:
      break;
  }
}

// --- one tile

// p = exp(s - max); the accumulators so far are rescaled to the new maximum.
void softmax_update(float* scores, int num_scores, float* row_max, float* row_sum, float* acc,
                    int acc_size) {
  VecF best = splat(kNegInf);
  for (int i = 0; i < num_scores; i += kWidth) best = vmax(load(scores + i), best);
  const float old_max = *row_max;
  const float segment_max = hmax(best);
  const float new_max = segment_max > old_max ? segment_max : old_max;
  // Every key so far may be masked (a window that starts later); then nothing is added.
  const VecF shift = splat(new_max == kNegInf ? 0.0f : new_max);
  VecF sum = {};
  for (int i = 0; i < num_scores; i += kWidth) {
    const VecF p = vexp(load(scores + i) - shift);
    store(scores + i, p);
    sum += p;
  }
  if (new_max != old_max) {
    const VecF factor = vexp(splat(old_max) - shift);
    for (int i = 0; i < acc_size; i += kWidth) store(acc + i, load(acc + i) * factor);
    *row_sum *= factor[0];
  }
  *row_sum += hsum(sum);
  *row_max = new_max;
}

// Fill a [16, padded size] float tile whose padding is zero.
template <class E>
void pad_block(const typename E::Type* block, int size, int num_keys, float* out) {
  const int stride = padded_size(size);
  for (int key = 0; key < num_keys; ++key) {
    float* row = out + key * stride;
    int i = 0;
    for (; i + kWidth <= size; i += kWidth) store(row + i, E::load_vec(block + key * size + i));
    for (; i < size; ++i) row[i] = E::to_float(block[key * size + i]);
    for (; i < stride; ++i) row[i] = 0.0f;
  }
}

template <class E>
void score_block(const PagedAttentionArgs& a, const typename E::Type* keys, int num_keys,
                 const float* query, int num_queries, Scratch& s, float* scores, int score_stride) {
  const int size = static_cast<int>(a.key_size);
  const int padded = padded_size(size);
  if (num_queries >= kTransposeFrom) {
    const float* tile = s.padded;
    if (sizeof(*keys) == sizeof(float) && size % 4 == 0) {
      tile = reinterpret_cast<const float*>(keys);
      transpose(tile, size, size, s.transposed);
    } else {
      pad_block<E>(keys, size, num_keys, s.padded);
      transpose(tile, padded, padded, s.transposed);
    }
    score_transposed(s.transposed, size, query, padded, num_queries, scores, score_stride);
  } else if (size == padded) {
    score_direct<E>(keys, size, num_keys, query, padded, num_queries, scores, score_stride);
  } else {
    pad_block<E>(keys, size, num_keys, s.padded);
    score_direct<F32>(s.padded, padded, num_keys, query, padded, num_queries, scores, score_stride);
  }
}

// Keys of the block that the query at `position` may attend to: [*first, *last).
void visible_keys(const KeyBlock& block, int64_t position, int64_t window, int* first, int* last) {
  const int64_t end = min64(block.num_keys, position + 1 - block.position);
  const int64_t begin = window > 0 ? position - window + 1 - block.position : 0;
  *last = static_cast<int>(max64(end, 0));
  *first = static_cast<int>(min64(max64(begin, 0), *last));
}

// Blocks [first_block, last_block) of `keys` against the scratch's queries [first_query,
// first_query
// + num_queries).
template <class E>
void attend_segment(const PagedAttentionArgs& a, const RowKeys& keys, int64_t kv_head,
                    int64_t first_block, int64_t last_block, int first_query, int num_queries,
                    Scratch& s) {
  typedef typename E::Type T;
  const int key_size = static_cast<int>(a.key_size);
  const int value_size = static_cast<int>(a.value_size);
  const int acc_size = padded_size(value_size);
  const int num_blocks = static_cast<int>(last_block - first_block);
  const int num_scores = num_blocks * kBlock;
  const T* values[kMaxSegment];
  int begin[kMaxSegment], end[kMaxSegment];
  const float* query = s.query + first_query * padded_size(a.key_size);
  float* acc = s.acc + first_query * acc_size;

  for (int b = 0; b < num_blocks; ++b) {
    const KeyBlock block = keys.at(first_block + b);
    const int64_t place = (block.id * a.num_kv_heads + kv_head) * kBlock;
    values[b] = static_cast<const T*>(a.value_pool) + place * value_size;
    score_block<E>(a, static_cast<const T*>(a.key_pool) + place * key_size, block.num_keys, query,
                   num_queries, s, s.scores + b * kBlock, num_scores);
  }
  const VecF scale = splat(a.scale);
  const VecF cap = splat(a.soft_cap);
  for (int i = 0; i < num_queries * num_scores; i += kWidth) {
    const VecF scaled = scale * load(s.scores + i);
    store(s.scores + i, a.soft_cap > 0 ? cap * vtanh(scaled / cap) : scaled);
  }
  for (int b = 0; b < num_blocks; ++b) {
    const KeyBlock block = keys.at(first_block + b);
    begin[b] = kBlock;
    end[b] = 0;
    for (int m = 0; m < num_queries; ++m) {
      int first, last;
      visible_keys(block, s.position[first_query + m], a.sliding_window, &first, &last);
      float* scores = s.scores + m * num_scores + b * kBlock;
      for (int key = 0; key < first; ++key) scores[key] = kNegInf;
      for (int key = last; key < kBlock; ++key) scores[key] = kNegInf;
      if (first == last) continue;
      begin[b] = first < begin[b] ? first : begin[b];
      end[b] = last > end[b] ? last : end[b];
    }
  }
  for (int m = 0; m < num_queries; ++m) {
    softmax_update(s.scores + m * num_scores, num_scores, s.row_max + first_query + m,
                   s.row_sum + first_query + m, acc + m * acc_size, acc_size);
  }
  // Only keys that some query sees are read: an unwritten slot may hold NaN, and 0 * NaN is NaN.
  if (value_size == acc_size) {
    add_values<E>(values, begin, end, num_blocks, value_size, s.scores, num_scores, num_queries,
                  acc, acc_size);
    return;
  }
  for (int b = 0; b < num_blocks; ++b) {
    pad_block<E>(values[b], value_size, end[b], s.padded);
    const float* padded = s.padded;
    add_values<F32>(&padded, begin + b, end + b, 1, acc_size, s.scores + b * kBlock, num_scores,
                    num_queries, acc, acc_size);
  }
}

// Blocks [first_block, last_block) in segments that the scores of these queries fit.
template <class E>
void attend_blocks(const PagedAttentionArgs& a, const RowKeys& keys, int64_t kv_head,
                   int64_t first_block, int64_t last_block, int first_query, int num_queries,
                   Scratch& s) {
  const int64_t segment = min64(kMaxSegment, kScoreBudget / (kBlock * num_queries));
  for (int64_t b = first_block; b < last_block; b += segment) {
    attend_segment<E>(a, keys, kv_head, b, min64(b + segment, last_block), first_query, num_queries,
                      s);
  }
}

int64_t num_queries_of(const PagedAttentionArgs& a, int64_t row) {
  return (a.query_start_loc[row + 1] - static_cast<int64_t>(a.query_start_loc[row])) *
         (a.num_heads / a.num_kv_heads);
}

// Query vectors of one row in a tile.
struct Span {
  int64_t row;
  int64_t first;  // of the row's vectors, counted position by position over the heads of the group
  int begin;      // in the tile: [begin, end)
  int end;
};

template <class E>
void load_queries(const PagedAttentionArgs& a, int64_t kv_head, const Span& span, Scratch& s) {
  typedef typename E::Type T;
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t first_token = a.query_start_loc[span.row];
  const int64_t num_tokens = a.query_start_loc[span.row + 1] - first_token;
  const int64_t first_position =
      a.prompt_lens[span.row] + static_cast<int64_t>(a.response_lens[span.row]) - num_tokens;
  const int key_size = static_cast<int>(a.key_size);
  const int query_stride = padded_size(a.key_size);
  const int acc_size = padded_size(a.value_size);
  for (int m = span.begin; m < span.end; ++m) {
    const int64_t vector = span.first + m - span.begin;
    const int64_t token = vector / group;
    const int64_t head = kv_head * group + vector % group;
    const T* query = static_cast<const T*>(a.query) + (first_token + token) * a.query_token_stride +
                     head * a.query_head_stride;
    float* q = s.query + m * query_stride;
    for (int i = 0; i < key_size; ++i) q[i] = E::to_float(query[i]);
    for (int i = key_size; i < query_stride; ++i) q[i] = 0.0f;
    memset(s.acc + m * acc_size, 0, static_cast<size_t>(acc_size) * sizeof(float));
    s.position[m] = first_position + token;
    s.row_max[m] = a.sinks != nullptr ? a.sinks[head] : kNegInf;
    s.row_sum[m] = a.sinks != nullptr ? 1.0f : 0.0f;
  }
}

template <class E>
void store_outputs(const PagedAttentionArgs& a, int64_t kv_head, const Span& span,
                   const Scratch& s) {
  typedef typename E::Type T;
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int value_size = static_cast<int>(a.value_size);
  const int acc_size = padded_size(a.value_size);
  for (int m = span.begin; m < span.end; ++m) {
    const int64_t vector = span.first + m - span.begin;
    const int64_t token = a.query_start_loc[span.row] + vector / group;
    const int64_t head = kv_head * group + vector % group;
    T* out = static_cast<T*>(a.out) + (token * a.num_heads + head) * value_size;
    const float* acc = s.acc + m * acc_size;
    const float inverse = 1.0f / s.row_sum[m];
    for (int i = 0; i < value_size; ++i) out[i] = E::from_float(acc[i] * inverse);
  }
}

// Query vectors [first, first + count) of the group, counted row by row.
template <class E>
void attend_tile(const PagedAttentionArgs& a, int64_t group, int64_t kv_head, int64_t first,
                 int count, Scratch& s) {
  Span spans[kMaxTile];
  int num_spans = 0;
  int64_t row = a.group_start[group];
  while (first >= num_queries_of(a, row)) first -= num_queries_of(a, row++);
  for (int begin = 0; begin < count; ++row, first = 0) {
    const int64_t end = min64(count, begin + num_queries_of(a, row) - first);
    spans[num_spans++] = {row, first, begin, static_cast<int>(end)};
    begin = static_cast<int>(end);
  }
  for (int i = 0; i < num_spans; ++i) load_queries<E>(a, kv_head, spans[i], s);

  const auto oldest_block = [&](const RowKeys& keys, int64_t position) {
    return a.sliding_window > 0 ? keys.block_of(max64(0, position - a.sliding_window + 1)) : 0;
  };
  // With several rows the blocks of their prompt come first, for the whole tile.
  int64_t num_shared = 0;
  if (num_spans > 1) {
    const RowKeys keys(a, spans[0].row);
    int64_t oldest = s.position[0];
    for (int m = 1; m < count; ++m) oldest = min64(oldest, s.position[m]);
    num_shared = keys.num_prompt_blocks;
    attend_blocks<E>(a, keys, kv_head, oldest_block(keys, oldest), num_shared, 0, count, s);
  }
  for (int i = 0; i < num_spans; ++i) {
    const Span& span = spans[i];
    const RowKeys keys(a, span.row);
    attend_blocks<E>(
        a, keys, kv_head, max64(num_shared, oldest_block(keys, s.position[span.begin])),
        keys.block_of(s.position[span.end - 1]) + 1, span.begin, span.end - span.begin, s);
    store_outputs<E>(a, kv_head, span, s);
  }
}

// --- all tiles

int64_t num_queries_of_group(const PagedAttentionArgs& a, int64_t group) {
  const int64_t begin = a.query_start_loc[a.group_start[group]];
  return (a.query_start_loc[a.group_start[group + 1]] - begin) * (a.num_heads / a.num_kv_heads);
}

int64_t num_tiles(const PagedAttentionArgs& a, int64_t group) {
  return (num_queries_of_group(a, group) + kMaxTile - 1) / kMaxTile;
}

template <class E>
void run(const PagedAttentionArgs& a) {
  int64_t tiles = 0;
  int64_t work = 0;
  for (int64_t group = 0; group < a.num_groups; ++group) tiles += num_tiles(a, group);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t tokens =
        a.query_start_loc[row + 1] - static_cast<int64_t>(a.query_start_loc[row]);
    work += tokens * (a.prompt_lens[row] + static_cast<int64_t>(a.response_lens[row]));
  }
  work *= a.num_heads * (a.key_size + a.value_size);
  const int64_t items = tiles * a.num_kv_heads;
  const int64_t useful = min64(min64(work / kWorkPerThread + 1, items), a.num_threads);
  const int threads = static_cast<int>(max64(useful, 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch;
    int64_t group = 0;  // the cursor: tiles [group_tile, group_tile + num_tiles(group)) are its
    int64_t group_tile = 0;
    // Heads outermost, so that rows which share blocks meet them in cache.
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t tile = item % tiles;
      if (tile < group_tile) group = group_tile = 0;
      while (tile >= group_tile + num_tiles(a, group)) group_tile += num_tiles(a, group++);
      const int64_t first = (tile - group_tile) * kMaxTile;
      const int64_t left = num_queries_of_group(a, group) - first;
      attend_tile<E>(a, group, item / tiles, first, static_cast<int>(min64(kMaxTile, left)),
                     scratch);
    }
  }
}

}  // namespace

void IVG_KERNEL(paged_attention)(const PagedAttentionArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<F32>(a);
    case DType::kBFloat16:
      return run<BF16>(a);
    case DType::kFloat16:
      return run<F16>(a);
  }
}

}  // namespace ivg::cpu
