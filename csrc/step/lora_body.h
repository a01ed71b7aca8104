// What an adapter adds to one token's outputs of a linear, over isa/vector.h. A token's bits depend on nothing beside it.
#pragma once
#include "isa/layer_kernels.h"
#include "isa/vector.h"

namespace {

INLINE float lora_dot(const float* a, const float* b, int64_t n) {
  Vec sums[4] = {all(0), all(0), all(0), all(0)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j)
      sums[j] = multiply_add(load(a + i + j * kLanes), load(b + i + j * kLanes), sums[j]);
  for (; i + kLanes <= n; i += kLanes) sums[0] = multiply_add(load(a + i), load(b + i), sums[0]);
  float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// x [inputs] -> y [rows], of which y is what the linear gave.
void lora(const QwenrtLora& l, const float* x, int64_t inputs, float* y) {
  float inner[QWENRT_LORA_RANK];
  for (int64_t r = 0; r < l.rank; ++r) inner[r] = l.scale * lora_dot(x, l.a + r * inputs, inputs);
  auto finish = [&](int64_t row, float update) {
    float own = y[row];
    if (l.row_scale) {
      const float plain = l.bias ? own - l.bias[row] : own;
      update = (l.row_scale[row] - 1) * plain + l.row_scale[row] * update;
    }
    own += update;
    y[row] = l.added ? own + l.added[row] : own;
  };
  const bool plain = !l.row_scale && !l.added;
  int64_t row = 0;
  for (; row + 4 * kLanes <= l.rows; row += 4 * kLanes) {
    Vec sums[4] = {all(0), all(0), all(0), all(0)};
    for (int64_t r = 0; r < l.rank; ++r) {
      const Vec factor = all(inner[r]);
      const float* const b = l.b + r * l.rows + row;
      for (int j = 0; j < 4; ++j) sums[j] = multiply_add(load(b + j * kLanes), factor, sums[j]);
    }
    if (plain) {
      for (int j = 0; j < 4; ++j) store(y + row + j * kLanes, add(load(y + row + j * kLanes), sums[j]));
      continue;
    }
    float updates[4 * kLanes];
    for (int j = 0; j < 4; ++j) store(updates + j * kLanes, sums[j]);
    for (int j = 0; j < 4 * kLanes; ++j) finish(row + j, updates[j]);
  }
  for (; row < l.rows; ++row) {
    float update = 0;
    for (int64_t r = 0; r < l.rank; ++r) update += l.b[r * l.rows + row] * inner[r];
    finish(row, update);
  }
}

}  // namespace
