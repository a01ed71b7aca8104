// Vectors of 16-bit integers whose products are added up in 32 bits, two to a sum: AVX-512 (VNNI), AVX2 or NEON where the
// file that includes this is compiled for them, plain C++ elsewhere, as isa/vector.h.
#pragma once
#include "isa/vector.h"

#if defined(QWENRT_VNNI)
#include <immintrin.h>
#endif

namespace {

#if defined(QWENRT_VNNI)

using Shorts = __m512i;  // kCodes of them
using Sums = __m512i;    // kCodes / 2 of them
constexpr int64_t kCodes = 32;
constexpr int kCodeSums = 16;  // sums in registers

INLINE Sums no_sums() { return _mm512_setzero_si512(); }
INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Shorts load_shorts(const uint8_t* codes) { return _mm512_cvtepu8_epi16(load32(codes)); }
INLINE Shorts load_shorts(const int16_t* p) { return _mm512_loadu_si512(p); }
INLINE Sums add_products(Shorts a, Shorts b, Sums sums) { return _mm512_dpwssd_epi32(sums, a, b); }
INLINE void two_rows(const uint8_t* a, const uint8_t* b, Shorts* both) {
  const __m256i x = load32(a), y = load32(b);
  both[0] = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(x, y));  // columns 0 to 7 and 16 to 23
  both[1] = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(x, y));
}
INLINE Shorts two_factors(const int16_t* factors) {
  int32_t both;
  memcpy(&both, factors, sizeof both);
  return _mm512_set1_epi32(both);
}
INLINE void load_sums(const int32_t* p, Sums* sums) {
  for (int i = 0; i < 2; ++i)
    sums[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load32(p + 8 * i)), load32(p + 8 * i + 16), 1);
}
INLINE void store_sums(int32_t* p, const Sums* sums) {
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * i), _mm512_castsi512_si256(sums[i]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * i + 16), _mm512_extracti64x4_epi64(sums[i], 1));
  }
}
INLINE void sum_each(const Sums* sums, float* totals) {
  __m512i pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2 * i], sums[2 * i + 1]),
                                _mm512_unpackhi_epi32(sums[2 * i], sums[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    eights[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x44),
                                 _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xee));
  _mm512_storeu_ps(totals, _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_shuffle_i32x4(eights[0], eights[1], 0x88),
                                                               _mm512_shuffle_i32x4(eights[0], eights[1], 0xdd))));
}

#elif defined(__AVX2__)

using Shorts = __m256i;
using Sums = __m256i;
constexpr int64_t kCodes = 16;
constexpr int kCodeSums = 8;

INLINE Sums no_sums() { return _mm256_setzero_si256(); }
INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE Shorts load_shorts(const uint8_t* codes) { return _mm256_cvtepu8_epi16(load16(codes)); }
INLINE Shorts load_shorts(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Sums add_products(Shorts a, Shorts b, Sums sums) { return _mm256_add_epi32(_mm256_madd_epi16(a, b), sums); }
INLINE void two_rows(const uint8_t* a, const uint8_t* b, Shorts* both) {
  const __m128i x = load16(a), y = load16(b);
  both[0] = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(x, y));
  both[1] = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(x, y));
}
INLINE Shorts two_factors(const int16_t* factors) {
  int32_t both;
  memcpy(&both, factors, sizeof both);
  return _mm256_set1_epi32(both);
}
INLINE void load_sums(const int32_t* p, Sums* sums) {
  for (int i = 0; i < 2; ++i) sums[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * i));
}
INLINE void store_sums(int32_t* p, const Sums* sums) {
  for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * i), sums[i]);
}
INLINE void sum_each(const Sums* sums, float* totals) {
  const __m256i x = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
  const __m256i y = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[4], sums[5]), _mm256_hadd_epi32(sums[6], sums[7]));
  store(totals, _mm256_cvtepi32_ps(
                    _mm256_add_epi32(_mm256_permute2x128_si256(x, y, 0x21), _mm256_blend_epi32(x, y, 0xf0))));
}

#elif defined(QWENRT_VEC_NEON)

using Shorts = int16x8_t;
using Sums = int32x4_t;
constexpr int64_t kCodes = 8;
constexpr int kCodeSums = 8;

INLINE Sums no_sums() { return vdupq_n_s32(0); }
INLINE Shorts load_shorts(const uint8_t* codes) { return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(codes))); }
INLINE Shorts load_shorts(const int16_t* p) { return vld1q_s16(p); }
INLINE Sums add_products(Shorts a, Shorts b, Sums sums) {
  return vmlal_high_s16(vmlal_s16(sums, vget_low_s16(a), vget_low_s16(b)), a, b);
}
INLINE void two_rows(const uint8_t* a, const uint8_t* b, Shorts* both) {
  const Shorts x = load_shorts(a), y = load_shorts(b);
  both[0] = vcombine_s16(vget_low_s16(x), vget_low_s16(y));
  both[1] = vcombine_s16(vget_high_s16(x), vget_high_s16(y));
}
INLINE Shorts two_factors(const int16_t* factors) {
  return vcombine_s16(vdup_n_s16(factors[0]), vdup_n_s16(factors[1]));
}
INLINE void load_sums(const int32_t* p, Sums* sums) {
  for (int i = 0; i < 2; ++i) sums[i] = vld1q_s32(p + 4 * i);
}
INLINE void store_sums(int32_t* p, const Sums* sums) {
  for (int i = 0; i < 2; ++i) vst1q_s32(p + 4 * i, sums[i]);
}
INLINE void sum_each(const Sums* sums, float* totals) {
  for (int i = 0; i < kCodeSums; ++i) totals[i] = float(vaddvq_s32(sums[i]));
}

#else

struct Shorts {
  int16_t lane[8];
};
struct Sums {
  int32_t lane[4];
};
constexpr int64_t kCodes = 8;
constexpr int kCodeSums = 8;

INLINE Sums no_sums() { return {}; }
INLINE Shorts load_shorts(const uint8_t* codes) {
  Shorts y;
  for (int i = 0; i < 8; ++i) y.lane[i] = codes[i];
  return y;
}
INLINE Shorts load_shorts(const int16_t* p) {
  Shorts y;
  memcpy(y.lane, p, sizeof y.lane);
  return y;
}
INLINE Sums add_products(const Shorts& a, const Shorts& b, Sums sums) {
  for (int i = 0; i < 4; ++i) sums.lane[i] += a.lane[i] * b.lane[i] + a.lane[i + 4] * b.lane[i + 4];
  return sums;
}
INLINE void two_rows(const uint8_t* a, const uint8_t* b, Shorts* both) {
  for (int i = 0; i < 8; ++i) {
    both[i / 4].lane[i % 4] = a[i];
    both[i / 4].lane[i % 4 + 4] = b[i];
  }
}
INLINE Shorts two_factors(const int16_t* factors) {
  Shorts y;
  for (int i = 0; i < 8; ++i) y.lane[i] = factors[i / 4];
  return y;
}
INLINE void load_sums(const int32_t* p, Sums* sums) { memcpy(sums, p, 2 * sizeof *sums); }
INLINE void store_sums(int32_t* p, const Sums* sums) { memcpy(p, sums, 2 * sizeof *sums); }
INLINE void sum_each(const Sums* sums, float* totals) {
  for (int i = 0; i < kCodeSums; ++i) {
    const int32_t* x = sums[i].lane;
    totals[i] = float((x[0] + x[1]) + (x[2] + x[3]));
  }
}

#endif

// After a loop that adds to sums. Where gcc sees what becomes of them then, it copies each at every turn.
INLINE void end_sums(Sums& sums) {
#if defined(__GNUC__) && defined(__AVX512F__)
  __asm__("" : "+v"(sums));
#elif defined(__GNUC__) && defined(__AVX2__)
  __asm__("" : "+x"(sums));
#else
  (void)sums;
#endif
}

}  // namespace
