// Where rounded activations lie, as isa/linear_kernels.h says of IntegerInput. Internal linkage: units with special
// flags have it.
#pragma once
#include "isa/linear_kernels.h"

namespace {

// One register's worth of LANES inputs, `step` apart.
template <int LANES>
inline uint32_t lanes_of(const int32_t* q, int64_t step) {
  constexpr uint32_t mask = LANES == 4 ? 0xff : 0xffff;
  uint32_t lanes = 0;
  for (int l = 0; l < LANES; ++l) lanes |= (uint32_t(q[l * step]) & mask) << (32 / LANES * l);
  return lanes;
}

template <int PER_WORD, int LANES>
inline void place_words(const int32_t* q, int64_t n, int32_t* out) {
  constexpr int PLACES = PER_WORD / LANES;
  for (int64_t i = 0; i < n; i += PER_WORD)
    for (int p = 0; p < PLACES; ++p) *out++ = int32_t(lanes_of<LANES>(q + i + p, PLACES));
}

inline void place_bytes(const int32_t* q, int64_t n, int bits, int32_t* out) {
  if (bits == 4) place_words<8, 4>(q, n, out);
  else place_words<4, 4>(q, n, out);
}

inline void place_pairs(const int32_t* q, int64_t n, int32_t* out) { place_words<4, 2>(q, n, out); }

// q [n] of a wide block as the bytes of 256 * high + low.
inline void place_wide(int32_t* q, int64_t n, int bits, int32_t* low, int32_t* high) {
  int32_t upper[kPairBlock];
  for (int64_t i = 0; i < n; ++i) {
    upper[i] = (q[i] + 128) >> 8;
    q[i] -= upper[i] * 256;
  }
  place_bytes(q, n, bits, low);
  place_bytes(upper, n, bits, high);
}

constexpr float kNarrowLimit = 127;
constexpr float kWideLimit = 32639;  // 127 * 256 + 127: the upper byte is 127 at most; pairs are rounded alike

// How a block is rounded whose largest activation and sum of sizes these are.
struct BlockScale {
  bool wide;
  float scale, inverse;
};

inline BlockScale scale_of(float largest, float total, int64_t n, NarrowRule narrow) {
  const bool wide = largest > narrow.largest || largest * float(n) > narrow.to_mean * total;
  const bool zeros = largest < kSmallestActivation;
  const float limit = wide ? kWideLimit : kNarrowLimit;
  return {wide, zeros ? 0.0f : largest / limit, zeros ? 0.0f : limit / largest};
}

}  // namespace
