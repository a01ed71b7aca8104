// Floats and Words of linear/linear_body.h for AVX2: the 8 rows of one block in one register. And what the other
// kernels of this folder share. Everything here has internal linkage: no other translation unit can end up with it.
#pragma once
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include <immintrin.h>

#include "isa/unroll.h"
#include "isa/vector.h"

namespace {

using Floats = Vec;
using Words = __m256i;

constexpr int kBlocks = 1;
constexpr int kMostChains = 2;
constexpr int kVectors16 = 2;
template <int TILE>
constexpr int kDenseRows = TILE == 4 ? 3 : 4;  // beside 4 tokens, 12 of the 16 registers hold sums

// The tokens of the next tile of a dense linear: all as equal as can be.
INLINE int64_t dense_tile_of(int64_t tokens) {
  const int64_t tiles = (tokens + 3) / 4;
  return (tokens + tiles - 1) / tiles;
}

INLINE Floats subtract_product(Floats c, Floats a, Floats b) { return _mm256_fnmadd_ps(a, b, c); }

INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE Words load_words(const uint32_t* const* blocks, int64_t offset) { return load256(blocks[0] + offset); }

template <int BITS, int J>
INLINE Floats code_at(Words word) {
  if constexpr (J == 32 / BITS - 1) return _mm256_cvtepi32_ps(_mm256_srli_epi32(word, 32 - BITS));
  else return _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(((1 << BITS) - 1) << (BITS * J))));
}

// 8 values of 16 bits: float16, or bfloat16.
template <bool HALF>
INLINE Floats load16(const uint16_t* p) {
  if constexpr (HALF) return _mm256_cvtph_ps(load128(p));
  else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}

// 16 of them. Unpacking works within halves of a register, hence the permutation.
template <bool HALF>
INLINE void load16(const uint16_t* p, Floats (&values)[2]) {
  if constexpr (HALF) {
    values[0] = load16<true>(p);
    values[1] = load16<true>(p + 8);
  } else {
    const __m256i raw = _mm256_permute4x64_epi64(load256(p), 0xd8);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), raw));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), raw));
  }
}

template <bool HALF>
INLINE float value16(const uint16_t* p) {
  const __m128i lane = _mm_cvtsi32_si128(*p);
  if constexpr (HALF) return _mm_cvtss_f32(_mm_cvtph_ps(lane));
  else return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(lane, 16)));
}

INLINE Floats load_scales(const QwenrtQuantMatrix& w, const int64_t* at) {
  if (w.scales_are_float) return load(static_cast<const float*>(w.scales) + at[0]);
  return load16<true>(static_cast<const uint16_t*>(w.scales) + at[0]);
}

INLINE Floats load_zeros(const QwenrtQuantMatrix& w, const int64_t* at) {
  const bool in_scales = !w.zeros && w.zero == QWENRT_ZEROS_IN_SCALES;
  if (!w.zeros && !in_scales) return all(float(w.zero));
  if (!in_scales && w.zeros_are_float) return load(static_cast<const float*>(w.zeros) + at[0]);
  __m128i zeros = load128(static_cast<const uint16_t*>(in_scales ? w.scales : w.zeros) + at[0]);
  if (in_scales) zeros = _mm_and_si128(zeros, _mm_set1_epi16(15));
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(zeros));
}

// A block's rows of one token, as many of them as there are.
INLINE void store_rows(const QwenrtQuantMatrix& w, float* y, Floats value, const int64_t* blocks) {
  const int64_t n = blocks[0] * QWENRT_BLOCK;
  if (n + QWENRT_BLOCK <= w.out_features) {
    store(y + n, w.bias ? add(value, load(w.bias + n)) : value);
    return;
  }
  alignas(32) float lanes[QWENRT_BLOCK];
  _mm256_store_ps(lanes, value);
  for (int64_t i = n; i < w.out_features; ++i) y[i] = w.bias ? lanes[i - n] + w.bias[i] : lanes[i - n];
}

// Asks for a line of weights that a step reads once. AMD's cores then keep it out of the second cache, which leaves
// room for the rest of the step (1 to 2 % of it); on Intel's the same hint takes two thirds of the speed.
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

constexpr int64_t kPanelTokens = 16;  // from so many on, converting a panel of rows pays

BlockKind avx2_round_block(const float* x, int64_t n, int bits, NarrowRule narrow, RoundedBlock& out);
void avx2_panel_rows(const DenseProduct& product, const FixedInput& fixed, int64_t begin, int64_t end);
void avx2_dense12_rows(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, int64_t begin, int64_t end);
void avx2_unpack12(const QwenrtDense12& w, int64_t row, uint16_t* out);
void avx2_integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end);
#endif
