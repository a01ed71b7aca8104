// One group of weights to codes, over isa/vector.h: _quantize_groups of qwenrt/ops/packing.py, step by step.
#pragma once
#include "isa/vector.h"
#include "isa/quantize_group.h"

namespace {

constexpr int kSumVecs = int(kSumLanes / kLanes);
static_assert(kSumVecs == 4, "folded() adds four");

struct Grid {
  float step, zero;
};

struct Fit {
  float scale, gain;
};

INLINE float folded(const Vec* sums) { return sum(add(add(sums[0], sums[2]), add(sums[1], sums[3]))); }

INLINE Vec steps_of(Vec w, Vec step, Vec low, Vec high) { return smaller(larger(nearest(div(w, step)), low), high); }

// The group's range with zero in it; false where a value is not finite.
INLINE bool range_of(const float* w, int64_t padded, float* low, float* high) {
  Vec most = all(0), negated = all(0), poison = all(0);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec value = load(w + i);
    most = larger(value, most);
    negated = larger(sub(all(0), value), negated);
    poison = add(poison, mul(value, all(0)));  // NaN where a value is NaN or infinite
  }
  *high = largest(most);
  *low = -largest(negated);
  return sum(poison) == 0;
}

// With s = <w, q> / <q, q> the squared error is <w, w> - <w, q>^2 / <q, q>: the largest gain is best.
INLINE Fit fit(const float* w, int64_t padded, const Grid& grid, float top) {
  const Vec step = all(grid.step), low = all(-grid.zero), high = all(top - grid.zero);
  Vec wq[kSumVecs], qq[kSumVecs];
  for (int n = 0; n < kSumVecs; ++n) wq[n] = qq[n] = all(0);
  for (int64_t i = 0; i < padded; i += kSumLanes)
    for (int n = 0; n < kSumVecs; ++n) {
      const Vec value = load(w + i + n * kLanes), q = steps_of(value, step, low, high);
      wq[n] = add(wq[n], mul(value, q));
      qq[n] = add(qq[n], mul(q, q));
    }
  const float product = folded(wq), square = folded(qq);
  const float scale = square > 0 ? product / (square > 1 ? square : 1) : grid.step;
  return {scale, product * scale};
}

INLINE void store_codes(const float* w, int64_t padded, const Grid& grid, float top, uint8_t* codes) {
  const Vec step = all(grid.step), zero = all(grid.zero), low = all(-grid.zero), high = all(top - grid.zero);
  for (int64_t i = 0; i < padded; i += kSumLanes) {
    float lanes[kSumLanes];
    for (int n = 0; n < kSumVecs; ++n)
      store(lanes + n * kLanes, add(steps_of(load(w + i + n * kLanes), step, low, high), zero));
    for (int j = 0; j < kSumLanes; ++j) codes[i + j] = uint8_t(int32_t(lanes[j]));
  }
}

INLINE bool quantize_group(const QwenrtRounding& a, const float* w, int64_t padded, uint8_t* codes, float* scale,
                           float* zero) {
  const float top = a.bits == 4 ? 15 : 255, middle = a.bits == 4 ? 8 : 128;
  float low, high;
  if (!range_of(w, padded, &low, &high)) return false;
  if (a.sym) {
    high = high > -low ? high : -low;
    low = -high;
  }
  const float smallest = 2 * 1.17549435e-38f * top;  // the smallest normal number
  const bool empty = high - low < smallest;
  const float span = empty ? 1 : high - low;
  Grid best{};
  Fit best_fit{};
  for (int c = 0; c < a.num_clips; ++c) {
    Grid grid{span * float(a.clips[c] / top), middle};
    if (!a.sym) {
      float lanes[kLanes];
      store(lanes, nearest(all(-low * float(a.clips[c]) / grid.step)));
      grid.zero = lanes[0] < 1 ? 1 : lanes[0] > top ? top : lanes[0];
    }
    const Fit tried = fit(w, padded, grid, top);
    if (c > 0 && !(tried.gain > best_fit.gain)) continue;
    best = grid;
    best_fit = tried;
  }
  store_codes(w, padded, best, top, codes);
  *scale = empty ? 1 : best_fit.scale;
  *zero = best.zero;
  return *scale - *scale == 0;
}

}  // namespace
