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
inline __m512i _mm512_cvtepu8_epi16(__m256i a) {
  uint8_t in[32];
  uint16_t out[32];
  memcpy(in, &a, sizeof in);
  for (int i = 0; i < 32; ++i) out[i] = in[i];
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

// AMX, of which SIMDe knows nothing: tiles as the configuration shapes them.
struct QwenrtTiles {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
  alignas(64) uint8_t data[8][16][64];
};
inline QwenrtTiles& qwenrt_tiles() {
  static thread_local QwenrtTiles tiles;
  return tiles;
}
inline void _tile_loadconfig(const void* config) { memcpy(&qwenrt_tiles(), config, 64); }
inline void _tile_release() { memset(&qwenrt_tiles(), 0, sizeof(QwenrtTiles)); }
inline void _tile_zero(int tile) { memset(qwenrt_tiles().data[tile], 0, sizeof qwenrt_tiles().data[tile]); }
inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  QwenrtTiles& t = qwenrt_tiles();
  _tile_zero(tile);
  for (int r = 0; r < t.rows[tile]; ++r)
    memcpy(t.data[tile][r], static_cast<const char*>(from) + r * stride, t.row_bytes[tile]);
}
inline void _tile_stored(int tile, void* to, int64_t stride) {
  const QwenrtTiles& t = qwenrt_tiles();
  for (int r = 0; r < t.rows[tile]; ++r)
    memcpy(static_cast<char*>(to) + r * stride, t.data[tile][r], t.row_bytes[tile]);
}
template <class Number, class Word>
void qwenrt_multiply_tiles(int sums, int left, int right, Number (*dot)(Word, Word, Number)) {
  QwenrtTiles& t = qwenrt_tiles();
  if (t.palette != 1 || t.row_bytes[left] != 4 * t.rows[right]) abort();
  for (int m = 0; m < t.rows[sums]; ++m)
    for (int n = 0; n < t.row_bytes[sums] / 4; ++n) {
      Number sum;
      memcpy(&sum, &t.data[sums][m][4 * n], 4);
      for (int k = 0; k < t.rows[right]; ++k) {
        Word a, b;
        memcpy(&a, &t.data[left][m][4 * k], 4);
        memcpy(&b, &t.data[right][k][4 * n], 4);
        sum = dot(a, b, sum);
      }
      memcpy(&t.data[sums][m][4 * n], &sum, 4);
    }
}
inline int32_t qwenrt_signed_times_unsigned(uint32_t a, uint32_t b, int32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += int32_t(int8_t(a >> i)) * int32_t(uint8_t(b >> i));
  return sum;
}
inline float qwenrt_bfloat_pairs(uint32_t a, uint32_t b, float sum) {
  const uint32_t halves[4] = {a << 16, b << 16, a & 0xffff0000, b & 0xffff0000};
  float values[4];
  memcpy(values, halves, sizeof values);
  return fmaf(values[2], values[3], fmaf(values[0], values[1], sum));
}
inline void _tile_dpbsud(int sums, int left, int right) {
  qwenrt_multiply_tiles<int32_t, uint32_t>(sums, left, right, qwenrt_signed_times_unsigned);
}
inline void _tile_dpbf16ps(int sums, int left, int right) {
  qwenrt_multiply_tiles<float, uint32_t>(sums, left, right, qwenrt_bfloat_pairs);
}

inline __m512 _mm512_i32gather_ps(__m512i places, const float* from, int) {
  int32_t at[16];
  float out[16];
  memcpy(at, &places, sizeof at);
  for (int i = 0; i < 16; ++i) out[i] = from[at[i]];
  return _mm512_loadu_ps(out);
}
