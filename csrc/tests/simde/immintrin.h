// Takes the place of the compiler's immintrin.h where the AVX-512 unit is built for CPUs that lack it.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// What SIMDe 0.7.4 lacks.
#include <cmath>
#include <cstdint>
#include <cstring>

inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  uint16_t in[16];
  uint32_t out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  return _mm512_loadu_si512(out);
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  int32_t in[16];
  float out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; ++i) out[i] = float(in[i]);
  return _mm512_loadu_ps(out);
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  uint16_t in[16];
  float out[16];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; ++i) {
    const int exponent = in[i] >> 10 & 31, fraction = in[i] & 1023;
    const float size = exponent == 31
                           ? (fraction ? NAN : INFINITY)
                           : ldexpf(float(exponent ? 1024 + fraction : fraction), (exponent ? exponent : 1) - 25);
    out[i] = in[i] & 0x8000 ? -size : size;
  }
  return _mm512_loadu_ps(out);
}
inline __m256 _mm256_maskz_loadu_ps(uint8_t mask, const float* p) {
  float out[8] = {};
  for (int i = 0; i < 8; ++i)
    if (mask >> i & 1) out[i] = p[i];
  return _mm256_loadu_ps(out);
}
inline void _mm256_mask_storeu_ps(float* p, uint8_t mask, __m256 a) {
  float in[8];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 8; ++i)
    if (mask >> i & 1) p[i] = in[i];
}

// SIMDe's round the product by itself.
#undef _mm512_fmadd_ps
#undef _mm512_fnmadd_ps
inline __m512 qwenrt_fused(__m512 a, __m512 b, __m512 c, float sign) {
  float x[16], y[16], z[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  memcpy(z, &c, sizeof z);
  for (int i = 0; i < 16; ++i) z[i] = fmaf(sign * x[i], y[i], z[i]);
  return _mm512_loadu_ps(z);
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return qwenrt_fused(a, b, c, 1); }
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return qwenrt_fused(a, b, c, -1); }
