// Products of queries and weights with the codes of an int8 cache, in integers: a query is rounded to 16 bits of its
// largest channel, a row's weights to 16 bits of the largest in the chunk. No sum of a chunk leaves 32 bits.
#pragma once
#include "isa/layer_kernels.h"
#include "isa/pairs.h"
#include "isa/unroll.h"

namespace {

constexpr int64_t kMostChannels = 256;
constexpr float kMostOf16Bits = 32767;
constexpr int32_t kMiddleCode = 128;
static_assert(kMostOf16Bits * 255 * kMostChannels < 2147483648.0f && kChunk <= kMostChannels, "sums overflow");

// Whole numbers, what one of them is worth, and their sum, which is NaN where one was not finite: they cannot say so.
struct Rounded {
  float step, sum;
};

INLINE Rounded round_to_16_bits(const float* x, int64_t count, int16_t* rounded) {  // count: a multiple of kLanes
  Vec most = all(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec y = load(x + i);
    most = larger(larger(y, sub(all(0), y)), most);
  }
  const float size = largest(most), factor = size > 1e-30f ? kMostOf16Bits / size : 0;
  Vec sums = all(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec y = mul(load(x + i), all(factor));
    store(rounded + i, y);
    sums = add(sums, nearest(y));
  }
  return {size / kMostOf16Bits, sum(sums)};
}

// Scores of ROWS rounded queries and the keys of places [place, end) of one head, and of a few beyond.
template <int ROWS>
INLINE void dot_codes(const int16_t (*q)[kMostChannels], const uint8_t* k, const int64_t* cells, int64_t head_dim,
                      float (*scores)[kChunk], int64_t place, int64_t end) {
  constexpr int KEYS = kCodeSums / ROWS;
  for (int64_t first = place; first < end; first += KEYS) {
    const uint8_t* key[KEYS];
    for (int n = 0; n < KEYS; ++n) key[n] = k + cells[first + n] * head_dim;
    Sums sums[kCodeSums];
    UNROLL(kCodeSums, i, { sums[i] = no_sums(); });
    for (int64_t c = 0; c < head_dim; c += kCodes) {
      Shorts y[KEYS];
      UNROLL(KEYS, n, { y[n] = load_shorts(key[n] + c); });
      UNROLL(ROWS, r, {
        const Shorts x = load_shorts(q[r] + c);
        UNROLL(KEYS, n, { sums[r * KEYS + n] = add_products(y[n], x, sums[r * KEYS + n]); });
      });
    }
    UNROLL(kCodeSums, i, { end_sums(sums[i]); });
    float dots[kCodeSums];
    sum_each(sums, dots);
    for (int r = 0; r < ROWS; ++r) memcpy(scores[r] + first, dots + r * KEYS, sizeof(float) * KEYS);
  }
}

// sums[row][c ...] += weight * code of places [place, end) and, where these are odd, of the next, whose weight is 0; for
// PAIRS * kCodes channels.
template <int ROWS, int PAIRS>
INLINE void add_codes(const int16_t (*weights)[kChunk], const uint8_t* v, const int64_t* cells, int64_t head_dim,
                      int64_t place, int64_t end, int32_t* const* outs, int64_t c) {
  Sums y[ROWS][PAIRS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < PAIRS; ++i) load_sums(outs[r] + c + i * kCodes, y[r][i]);
  for (int64_t n = place; n < end; n += 2) {
    const uint8_t *a = v + cells[n] * head_dim + c, *b = v + cells[n + 1] * head_dim + c;
    Shorts w[ROWS];
    for (int r = 0; r < ROWS; ++r) w[r] = two_factors(weights[r] + n);
    for (int i = 0; i < PAIRS; ++i) {
      Shorts both[2];
      two_rows(a + i * kCodes, b + i * kCodes, both);
      for (int r = 0; r < ROWS; ++r)
        for (int half = 0; half < 2; ++half) y[r][i][half] = add_products(both[half], w[r], y[r][i][half]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < PAIRS; ++i) store_sums(outs[r] + c + i * kCodes, y[r][i]);
}

template <int ROWS>
INLINE void add_coded_values(const int16_t (*weights)[kChunk], const uint8_t* v, const int64_t* cells, int64_t head_dim,
                             int64_t place, int64_t end, int32_t* const* outs) {
  constexpr int PAIRS = kCodeSums / ROWS / 2;
  int64_t c = 0;
  for (; c + PAIRS * kCodes <= head_dim; c += PAIRS * kCodes)
    add_codes<ROWS, PAIRS>(weights, v, cells, head_dim, place, end, outs, c);
  for (; c < head_dim; c += kCodes) add_codes<ROWS, 1>(weights, v, cells, head_dim, place, end, outs, c);
}

}  // namespace
