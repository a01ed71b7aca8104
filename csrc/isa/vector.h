// Eight floats: AVX2 or NEON where the file that includes this is compiled for them and does not define
// QWENRT_PORTABLE, plain C++ elsewhere. The bodies of the kernels are written once over this type. Everything is local
// to the including file, which may be built with flags that no other code may meet.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(QWENRT_PORTABLE)
#define QWENRT_VEC_NEON 1
#include <arm_neon.h>
#else
#include <math.h>
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

namespace {

constexpr int64_t kLanes = 8;

INLINE float infinity() {
  const uint32_t bits = 0x7f800000;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

#if defined(__AVX2__) && defined(__FMA__)

using Vec = __m256;

INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Vec load(const uint8_t* p) {  // codes, converted
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE Vec load(const int32_t* p) {  // converted
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
INLINE void store(int16_t* p, Vec a) {  // rounded to whole numbers; what is beyond 16 bits or NaN gives any
  const __m256i whole = _mm256_cvtps_epi32(a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
INLINE Vec all(float x) { return _mm256_set1_ps(x); }
INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }   // b where either is NaN
INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }  // likewise
INLINE Vec below(Vec a, Vec b, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
INLINE Vec power_of_two(Vec n) {  // n whole, -126 to 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
#define QWENRT_OWN_TRANSPOSE
INLINE Vec sum_each(const Vec* a) {
  const Vec x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const Vec y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x21), _mm256_blend_ps(x, y, 0xf0));
}
INLINE void transpose(Vec* a) {
  Vec pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    a[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

#elif defined(QWENRT_VEC_NEON)

struct Vec {
  float32x4_t low, high;
};

INLINE Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE Vec load(const uint8_t* p) {
  const uint16x8_t codes = vmovl_u8(vld1_u8(p));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(codes))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(codes)))};
}
INLINE Vec load(const int32_t* p) { return {vcvtq_f32_s32(vld1q_s32(p)), vcvtq_f32_s32(vld1q_s32(p + 4))}; }
INLINE void store(int16_t* p, Vec a) {
  vst1q_s16(p, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.low)), vqmovn_s32(vcvtnq_s32_f32(a.high))));
}
INLINE void store(float* p, Vec a) {
  vst1q_f32(p, a.low);
  vst1q_f32(p + 4, a.high);
}
INLINE Vec all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE Vec add(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
INLINE Vec sub(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
INLINE Vec mul(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
INLINE Vec div(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
// NEON's own minimum and maximum give NaN where either is one; these give b, as on other machines.
INLINE Vec larger(Vec a, Vec b) {
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
INLINE Vec smaller(Vec a, Vec b) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}
INLINE Vec below(Vec a, Vec b, Vec yes, Vec no) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), yes.low, no.low), vbslq_f32(vcltq_f32(a.high, b.high), yes.high, no.high)};
}
INLINE Vec nearest(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
INLINE float square_root(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }
INLINE float32x4_t power_of_two(float32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
INLINE Vec power_of_two(Vec n) { return {power_of_two(n.low), power_of_two(n.high)}; }
INLINE float sum(Vec a) {
  const float32x4_t x = vaddq_f32(a.low, a.high);
  const float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}

#else

struct Vec {
  float lane[kLanes];
};
#define QWENRT_EACH(expression)                             \
  Vec y;                                                    \
  for (int i = 0; i < kLanes; ++i) y.lane[i] = (expression); \
  return y

INLINE Vec load(const float* p) { QWENRT_EACH(p[i]); }
INLINE Vec load(const uint8_t* p) { QWENRT_EACH(float(p[i])); }
INLINE Vec load(const int32_t* p) { QWENRT_EACH(float(p[i])); }
INLINE void store(float* p, const Vec& a) { memcpy(p, a.lane, sizeof a.lane); }
INLINE void store(int16_t* p, const Vec& a) {
  for (int i = 0; i < kLanes; ++i)
    p[i] = a.lane[i] >= 32767 ? int16_t(32767) : a.lane[i] >= -32768 ? int16_t(nearbyintf(a.lane[i])) : int16_t(-32768);
}
INLINE Vec all(float x) { QWENRT_EACH(x); }
INLINE Vec add(const Vec& a, const Vec& b) { QWENRT_EACH(a.lane[i] + b.lane[i]); }
INLINE Vec sub(const Vec& a, const Vec& b) { QWENRT_EACH(a.lane[i] - b.lane[i]); }
INLINE Vec mul(const Vec& a, const Vec& b) { QWENRT_EACH(a.lane[i] * b.lane[i]); }
INLINE Vec div(const Vec& a, const Vec& b) { QWENRT_EACH(a.lane[i] / b.lane[i]); }
INLINE Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) { QWENRT_EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
INLINE Vec larger(const Vec& a, const Vec& b) { QWENRT_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE Vec smaller(const Vec& a, const Vec& b) { QWENRT_EACH(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE Vec below(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
  QWENRT_EACH(a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]);
}
INLINE Vec nearest(const Vec& a) { QWENRT_EACH(nearbyintf(a.lane[i])); }
INLINE float square_root(float x) { return sqrtf(x); }
INLINE Vec power_of_two(const Vec& n) {
  Vec y;
  for (int i = 0; i < kLanes; ++i) {
    // A NaN may be no whole number, and what it gives must not matter.
    const uint32_t bits = n.lane[i] >= -126 && n.lane[i] <= 127 ? uint32_t(int32_t(n.lane[i]) + 127) << 23 : 0;
    memcpy(&y.lane[i], &bits, sizeof bits);
  }
  return y;
}
INLINE float sum(const Vec& a) {
  const float* x = a.lane;
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
#undef QWENRT_EACH

#endif

#if !defined(QWENRT_OWN_TRANSPOSE)
// Lane n: the sum of a[n], eight of them, each in the same order.
INLINE Vec sum_each(const Vec* a) {
  float sums[kLanes], x[kLanes];
  for (int n = 0; n < kLanes; ++n) {
    store(x, a[n]);
    sums[n] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
  return load(sums);
}

// Lane i of a[n] <-> lane n of a[i], for eight of them.
INLINE void transpose(Vec* a) {
  float from[kLanes][kLanes], to[kLanes];
  for (int n = 0; n < kLanes; ++n) store(from[n], a[n]);
  for (int i = 0; i < kLanes; ++i) {
    for (int n = 0; n < kLanes; ++n) to[n] = from[n][i];
    a[i] = load(to);
  }
}
#endif

// The largest lane; lanes that are NaN count where they come first only.
INLINE float largest(Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// e^x to about one unit in the last place: x = n ln 2 + r, and e^r by its series, whose next term is below 6e-9 of it.
// 0 below -87.3 and infinity above 88.3, where float32 ends or nearly so; NaN stays NaN; e^0 is 1.
INLINE Vec exponential(Vec x) {
  const Vec low = all(-87.3f), high = all(88.3f);
  const Vec inside = larger(low, smaller(high, x));
  const Vec n = nearest(mul(inside, all(1.44269504f)));
  // ln 2 in two parts, the first with so few bits that n times it is exact.
  Vec r = multiply_add(n, all(-0.693359375f), inside);
  r = multiply_add(n, all(2.12194440e-4f), r);
  Vec y = all(1.0f / 5040);
  y = multiply_add(y, r, all(1.0f / 720));
  y = multiply_add(y, r, all(1.0f / 120));
  y = multiply_add(y, r, all(1.0f / 24));
  y = multiply_add(y, r, all(1.0f / 6));
  y = multiply_add(y, r, all(0.5f));
  y = multiply_add(y, r, all(1.0f));
  y = multiply_add(y, r, all(1.0f));
  y = mul(y, power_of_two(n));
  y = below(x, low, all(0.0f), y);
  return below(high, x, all(infinity()), y);
}

}  // namespace
