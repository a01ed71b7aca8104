// What the AVX2 kernels share. Everything here has internal linkage: no other translation unit can end up with it.
#pragma once
#include "kernels.h"

#ifdef QWENRT_X86
#include <immintrin.h>

#include "unroll.h"

namespace {

inline __m256 load_scales(const QwenrtQuantMatrix& w, int64_t i) {
  if (w.scales_are_float) return _mm256_loadu_ps(static_cast<const float*>(w.scales) + i);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(w.scales) + i)));
}

inline __m256 load_zeros(const QwenrtQuantMatrix& w, int64_t i) {
  if (!w.zeros) return _mm256_set1_ps(float(w.zero));
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + i))));
}

// Rows n to n + 7 of one token, as many of them as there are.
inline void store_rows(const QwenrtQuantMatrix& w, float* y, __m256 value, int64_t n) {
  if (n + QWENRT_BLOCK <= w.out_features) {
    if (w.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(w.bias + n));
    _mm256_storeu_ps(y + n, value);
    return;
  }
  alignas(32) float lanes[QWENRT_BLOCK];
  _mm256_store_ps(lanes, value);
  for (int64_t i = n; i < w.out_features; ++i) y[i] = w.bias ? lanes[i - n] + w.bias[i] : lanes[i - n];
}

}  // namespace

int avx2_round_block(const float* x, int64_t n, int bits, float narrow, float outlier, int32_t* low, int32_t* high,
                     float* scale, int32_t* sum);
void avx2_dense16_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                       int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end);
extern const int64_t avx2_dense_tiles_from;
void avx2_integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end);
#endif
