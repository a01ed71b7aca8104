// What an adapter adds to a linear's outputs, over isa/vector.h: a few tokens share what is read of A and of B. A token's
// bits depend on nothing beside it: each of its numbers is summed in the same order in every tile.
#pragma once
#include "isa/layer_kernels.h"
#include "isa/vector.h"

namespace {

constexpr int kLoraTokens = 4;  // of a tile
constexpr int kLoraSums = 8;    // vectors of sums that are in registers together; sum_each takes as many

// The first n of eight floats, zeros behind them.
INLINE Vec load_some(const float* p, int64_t n) {
  float lanes[kLanes] = {};
  memcpy(lanes, p, size_t(n) * sizeof(float));
  return load(lanes);
}

// inner[RANKS][TOKENS] = scale * (A x), for RANKS rows of A.
template <int TOKENS, int RANKS>
INLINE void lora_inner(const float* a, const float* x, int64_t inputs, float scale, float* inner) {
  Vec sums[kLoraSums];
  for (int n = 0; n < kLoraSums; ++n) sums[n] = all(0);
  auto add_products = [&](auto loaded, int64_t i) {
    Vec values[TOKENS];
    for (int t = 0; t < TOKENS; ++t) values[t] = loaded(x + t * inputs + i);
    for (int r = 0; r < RANKS; ++r) {
      const Vec row = loaded(a + r * inputs + i);
      for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS + t] = multiply_add(row, values[t], sums[r * TOKENS + t]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) add_products([](const float* p) { return load(p); }, i);
  if (const int64_t rest = inputs - i) add_products([rest](const float* p) { return load_some(p, rest); }, i);
  float totals[kLanes];
  store(totals, mul(sum_each(sums), all(scale)));
  memcpy(inner, totals, sizeof(float) * RANKS * TOKENS);
}

// What becomes of `own`, what the linear gave of eight rows from `row` on.
template <class Load>
INLINE Vec lora_sum(const QwenrtLora& l, int64_t row, Vec own, Vec update, Load loaded) {
  if (l.row_scale) {
    const Vec factor = loaded(l.row_scale + row), plain = l.bias ? sub(own, loaded(l.bias + row)) : own;
    update = multiply_add(factor, update, mul(sub(factor, all(1)), plain));
  }
  own = add(own, update);
  return l.added ? add(own, loaded(l.added + row)) : own;
}

// Eight VECTORS rows of y from `row` on, or `rest` of them.
template <int TOKENS, int VECTORS>
INLINE void lora_rows(const QwenrtLora& l, const float* inner, float* y, int64_t stride, int64_t row, int64_t rest) {
  Vec sums[TOKENS][VECTORS];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < VECTORS; ++j) sums[t][j] = all(0);
  auto loaded = [rest](const float* p) { return rest < kLanes ? load_some(p, rest) : load(p); };
  for (int64_t r = 0; r < l.rank; ++r) {
    const float* const b = l.b + r * l.rows + row;
    Vec values[VECTORS];
    for (int j = 0; j < VECTORS; ++j) values[j] = loaded(b + j * kLanes);
    for (int t = 0; t < TOKENS; ++t) {
      const Vec factor = all(inner[r * TOKENS + t]);
      for (int j = 0; j < VECTORS; ++j) sums[t][j] = multiply_add(values[j], factor, sums[t][j]);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < VECTORS; ++j) {
      float* const at = y + t * stride + j * kLanes;
      const Vec made = lora_sum(l, row + j * kLanes, loaded(at), sums[t][j], loaded);
      if (rest < kLanes) {
        float lanes[kLanes];
        store(lanes, made);
        memcpy(at, lanes, size_t(rest) * sizeof(float));
      } else {
        store(at, made);
      }
    }
}

template <int TOKENS>
void lora_tile(const QwenrtLora& l, const float* x, int64_t inputs, float* y, int64_t stride) {
  constexpr int kRanks = kLoraSums / TOKENS, kVectors = kLoraSums / TOKENS;
  float inner[QWENRT_LORA_RANK * TOKENS];
  int64_t r = 0;
  for (; r + kRanks <= l.rank; r += kRanks)
    lora_inner<TOKENS, kRanks>(l.a + r * inputs, x, inputs, l.scale, inner + r * TOKENS);
  for (; r < l.rank; ++r) lora_inner<TOKENS, 1>(l.a + r * inputs, x, inputs, l.scale, inner + r * TOKENS);
  int64_t row = 0;
  for (; row + kVectors * kLanes <= l.rows; row += kVectors * kLanes)
    lora_rows<TOKENS, kVectors>(l, inner, y + row, stride, row, kLanes);
  for (; row + kLanes <= l.rows; row += kLanes) lora_rows<TOKENS, 1>(l, inner, y + row, stride, row, kLanes);
  if (row < l.rows) lora_rows<TOKENS, 1>(l, inner, y + row, stride, row, l.rows - row);
}

// x [tokens][inputs] -> y, rows of `stride` floats that begin with those of l: what the linear gave, and what is to be.
void lora(const QwenrtLora& l, const float* x, int64_t inputs, float* y, int64_t stride, int64_t tokens) {
  int64_t t = 0;
  for (; t + kLoraTokens <= tokens; t += kLoraTokens)
    lora_tile<kLoraTokens>(l, x + t * inputs, inputs, y + t * stride, stride);
  for (; t < tokens; ++t) lora_tile<1>(l, x + t * inputs, inputs, y + t * stride, stride);
}

}  // namespace
