// Floats and Words of linear/linear_body.h for AVX-512: the 16 rows of two blocks in one register.
#pragma once
#include <immintrin.h>

#include "isa/linear_kernels.h"
#include "isa/unroll.h"

namespace {

using Floats = __m512;
using Words = __m512i;

constexpr int kBlocks = 2;
constexpr int kMostChains = 4;
constexpr int kVectors16 = 1;
template <int TILE>
constexpr int kDenseRows = 4;  // beside 4 tokens, 16 of the 32 registers hold sums

// The tokens of the next tile of a dense linear.
INLINE int64_t dense_tile_of(int64_t tokens) { return tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1; }

INLINE Floats all(float x) { return _mm512_set1_ps(x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }

INLINE Words join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256i load2x128(const uint16_t* low, const uint16_t* high) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)),
                                 1);
}
INLINE Words load_words(const uint32_t* const* blocks, int64_t offset) {
  return join(load256(blocks[0] + offset), load256(blocks[1] + offset));
}

INLINE __m256 upper(Floats a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

INLINE float sum(Floats a) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

template <int BITS, int J>
INLINE Floats code_at(Words word) {
  if constexpr (J == 32 / BITS - 1) return _mm512_cvtepi32_ps(_mm512_srli_epi32(word, 32 - BITS));
  else return _mm512_cvtepi32_ps(_mm512_and_si512(word, _mm512_set1_epi32(((1 << BITS) - 1) << (BITS * J))));
}

// 16 values a vector: float16, or bfloat16.
template <bool HALF, int N>
INLINE void load16(const uint16_t* p, Floats (&values)[N]) {
  UNROLL(N, i, {
    const __m256i raw = load256(p + 16 * i);
    if constexpr (HALF) values[i] = _mm512_cvtph_ps(raw);
    else values[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  });
}

template <bool HALF>
INLINE float value16(const uint16_t* p) {
  const __m128i lane = _mm_cvtsi32_si128(*p);
  if constexpr (HALF) return _mm_cvtss_f32(_mm_cvtph_ps(lane));
  else return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(lane, 16)));
}

INLINE Floats load_scales(const QwenrtQuantMatrix& w, const int64_t* at) {
  if (w.scales_are_float) {
    const float* scales = static_cast<const float*>(w.scales);
    return _mm512_castsi512_ps(join(load256(scales + at[0]), load256(scales + at[1])));
  }
  const uint16_t* scales = static_cast<const uint16_t*>(w.scales);
  return _mm512_cvtph_ps(load2x128(scales + at[0], scales + at[1]));
}

INLINE Floats load_zeros(const QwenrtQuantMatrix& w, const int64_t* at) {
  if (w.zeros && w.zeros_are_float) {
    const float* zeros = static_cast<const float*>(w.zeros);
    return _mm512_castsi512_ps(join(load256(zeros + at[0]), load256(zeros + at[1])));
  }
  if (w.zeros) {
    const uint16_t* zeros = static_cast<const uint16_t*>(w.zeros);
    return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(load2x128(zeros + at[0], zeros + at[1])));
  }
  if (w.zero != QWENRT_ZEROS_IN_SCALES) return _mm512_set1_ps(float(w.zero));
  const uint16_t* scales = static_cast<const uint16_t*>(w.scales);
  const __m512i both = _mm512_cvtepu16_epi32(load2x128(scales + at[0], scales + at[1]));
  return _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
}

// Both of one group. Where a scale's last bits are its zero, one load gives both: in groups of 32 they are read often.
INLINE void load_scales_and_zeros(const QwenrtQuantMatrix& w, const int64_t* at, Floats* scale, Floats* zero) {
  if (__builtin_expect(w.zero == QWENRT_ZEROS_IN_SCALES && !w.zeros, 1)) {
    const uint16_t* scales = static_cast<const uint16_t*>(w.scales);
    const __m256i both = load2x128(scales + at[0], scales + at[1]);
    *scale = _mm512_cvtph_ps(both);
    *zero = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_cvtepu16_epi32(both), _mm512_set1_epi32(15)));
    return;
  }
  *scale = load_scales(w, at);
  *zero = load_zeros(w, at);
}

// The blocks' rows of one token, as many of them as there are.
INLINE void store_rows(const QwenrtQuantMatrix& w, float* y, Floats value, const int64_t* blocks) {
  const __m256 halves[kBlocks] = {_mm512_castps512_ps256(value), upper(value)};
  UNROLL(kBlocks, b, {
    const int64_t n = blocks[b] * QWENRT_BLOCK, rest = w.out_features - n;
    const uint8_t rows = uint8_t(rest < QWENRT_BLOCK ? (1 << rest) - 1 : 0xff);
    const __m256 bias = w.bias ? _mm256_maskz_loadu_ps(rows, w.bias + n) : _mm256_setzero_ps();
    _mm256_mask_storeu_ps(y + n, rows, w.bias ? _mm256_add_ps(halves[b], bias) : halves[b]);
  });
}

// ---- integers, of linear/integer_body.h

using Ints = __m512i;
template <int BITS>
struct Products {
  __m512i sums;
};
constexpr bool kSignedCodes = false;
constexpr int kStreams1 = 2, kStreams2 = 2, kStreams4 = 2;

INLINE Words all_words(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints times_256(Ints a) { return _mm512_slli_epi32(a, 8); }
INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }

template <int BITS, int P>
INLINE Words bytes_at(Words word) {
  if constexpr (BITS == 8) return word;
  else return _mm512_and_si512(P ? _mm512_srli_epi32(word, 4 * P) : word, _mm512_set1_epi32(0x0f0f0f0f));
}
template <int BITS>
INLINE void clear(Products<BITS>& p) { p.sums = _mm512_setzero_si512(); }
template <int BITS>
INLINE void add_products(Products<BITS>& p, Words codes, Words x) { p.sums = _mm512_dpbusd_epi32(p.sums, codes, x); }
template <int BITS>
INLINE Ints total_of(const Products<BITS>& p) { return p.sums; }

// For machines whose codes are signed.
INLINE Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
template <int TILE>
INLINE void add_byte_sums(const int32_t*, int64_t, int32_t (&)[TILE]) {}

INLINE void round8(const float* x, float inverse, int32_t* q) {
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), rounded);
}

}  // namespace
