// Blocks of a token's activations that one scale for all of a block does not serve: those with an outlier, a value far
// above the token's others, beside which many of the block's are far smaller and would lose their digits. W may make
// much of these, so what rounding leaves of such a block, its residual, is multiplied as well.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

// The sum of f(x) over activations, in one order, so that it is the same everywhere.
template <class Number, class Of>
Number total_of(const float* x, int64_t n, Of f) {
  Number totals[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) totals[j] += f(Number(x[i + j]));
  for (; i < n; ++i) totals[i % 8] += f(Number(x[i]));
  for (int j = 1; j < 8; ++j) totals[0] += totals[j];
  return totals[0];
}

// The bits of |x| are in its order, infinity and then NaN above all numbers.
static inline int32_t size_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

static inline float largest_of(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, size_of(x[i]));
  float largest;
  memcpy(&largest, &most, sizeof largest);
  return largest;
}

// Above which a value is an outlier: so many times the mean.
static inline float outlier_from(const float* x, int64_t n, float times) {
  return total_of<float>(x, n, [](float value) { return fabsf(value); }) * (times / float(n));
}

// Whether a value is above `outlier` and a quarter of the block, zeros aside, is more than `far` times smaller.
static inline bool needs_residual(const float* x, int64_t n, float outlier, float far) {
  const float largest = largest_of(x, n);
  if (!(largest > outlier)) return false;
  const int32_t much = size_of(largest / far);
  int32_t small = 0;
  for (int64_t i = 0; i < n; ++i) small += (size_of(x[i]) > 0) & (size_of(x[i]) < much);
  return small * 4 >= n;
}
