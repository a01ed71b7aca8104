// What the AVX2 kernels share. Everything here has internal linkage: no other translation unit can end up with it.
#pragma once
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include <immintrin.h>

#include "isa/unroll.h"

namespace {

// Scales and zeros of the next group of row blocks that are `apart` groups from each other.
struct GroupScales {
  const char* scale;
  int64_t scale_bytes, scale_apart;
  const uint16_t* zero;
  int64_t zero_apart;
  bool in_scales;  // where `zero` points then
  __m256 all_zeros;

  INLINE GroupScales(const QwenrtQuantMatrix& w, int64_t first, int64_t apart) {
    scale_bytes = QWENRT_BLOCK * (w.scales_are_float ? 4 : 2);
    scale = static_cast<const char*>(w.scales) + first * scale_bytes;
    scale_apart = apart * scale_bytes;
    in_scales = !w.zeros && w.zero == QWENRT_ZEROS_IN_SCALES;
    const uint16_t* const zeros = in_scales ? static_cast<const uint16_t*>(w.scales) : w.zeros;
    zero = zeros ? zeros + first * QWENRT_BLOCK : nullptr;
    zero_apart = apart * QWENRT_BLOCK;
    all_zeros = _mm256_set1_ps(float(w.zero));
  }
  INLINE __m256 scales(int s) const {
    const char* at = scale + s * scale_apart;
    if (scale_bytes == QWENRT_BLOCK * 4) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  INLINE __m256 zeros(int s) const {
    if (!zero) return all_zeros;
    __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + s * zero_apart));
    if (in_scales) zeros = _mm_and_si128(zeros, _mm_set1_epi16(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(zeros));
  }
  INLINE void advance() {
    scale += scale_bytes;
    if (zero) zero += QWENRT_BLOCK;
  }
};

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

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Asks for a line of weights that a step reads once. AMD's cores then keep it out of the second cache, which leaves room
// for the rest of the step (1 to 2 % of it); on Intel's the same hint takes two thirds of the speed.
template <bool ONCE>
INLINE void ask_for(const char* line) {
  _mm_prefetch(line, ONCE ? _MM_HINT_NTA : _MM_HINT_T0);
}
INLINE bool hint_once() { return __builtin_cpu_is("amd"); }

// Keeps the compiler from deriving addresses of its own, one for each load, which it would count up one by one.
template <class A, class B>
INLINE void stay(A& a, B& b) {
  asm("" : "+r"(a), "+r"(b));
}

}  // namespace

int avx2_round_block(const float* x, int64_t n, int bits, float narrow, float outlier, int32_t* low, int32_t* high,
                     float* scale, int32_t* sum);
void avx2_dense16_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                       int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end);
void avx2_fixed_rows(const uint16_t* w, const float* bias, const float* x, const FixedInput& fixed, float* y,
                     int64_t tokens, int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end);
void avx2_dense12_rows(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, int64_t begin, int64_t end);
void avx2_unpack12(const QwenrtDense12& w, int64_t row, uint16_t* out);
extern const int64_t avx2_dense_tiles_from;
void avx2_integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end);
#endif
