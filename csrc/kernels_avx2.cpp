// AVX2, FMA and F16C kernels.
//
// A quantised word is never unpacked: code j is masked where it lies, converted to float as code * 2^(bits * j), and
// multiplied by an activation that already carries 2^(-bits * j). Each 8 rows x 1 input cost one and, one convert and
// one multiply-add. A thread reads several distant row blocks at once, because one sequential stream per core does not
// fill the memory bus.
#include "kernels_avx2.h"

#ifdef QWENRT_X86

namespace {

template <int BITS, int J>
INLINE __m256 code_at(__m256i word) {
  constexpr int last = 32 / BITS - 1;
  if constexpr (J == last) return _mm256_cvtepi32_ps(_mm256_srli_epi32(word, 32 - BITS));
  else return _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(((1 << BITS) - 1) << (BITS * J))));
}

// STREAMS row blocks, `stride` blocks apart, times one tile of TILE tokens.
template <int BITS, int TILE, int STREAMS>
void blocks_times_tile(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t first, int64_t stride,
                       int64_t tile) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr int CHAINS = TILE == 1 ? 2 : 1;  // of the tile alone: a row's sums are the same wherever it is computed
  const int64_t row_words = w.groups * w.words_per_group;
  const float* x = in.x + tile * in.padded * TILE;
  const float* sums = in.sums + tile * w.groups * TILE;
  const uint32_t* words[STREAMS];
  for (int s = 0; s < STREAMS; ++s) words[s] = w.words + (first + s * stride) * row_words * QWENRT_BLOCK;
  __m256 total[STREAMS][TILE];
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { total[s][t] = _mm256_setzero_ps(); }); });

  int64_t offset = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    __m256 acc[CHAINS][STREAMS][TILE];
    UNROLL(CHAINS, c, { UNROLL(STREAMS, s, { UNROLL(TILE, t, { acc[c][s][t] = _mm256_setzero_ps(); }); }); });
    for (int64_t i = 0; i < w.words_per_group; ++i, offset += QWENRT_BLOCK, x += PER_WORD * TILE) {
      __m256i word[STREAMS];
      UNROLL(STREAMS, s, { word[s] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words[s] + offset)); });
      UNROLL(PER_WORD, j, {
        __m256 xs[TILE];
        UNROLL(TILE, t, { xs[t] = _mm256_broadcast_ss(x + j * TILE + t); });
        UNROLL(STREAMS, s, {
          const __m256 code = code_at<BITS, j>(word[s]);
          UNROLL(TILE, t, {
            acc[j % CHAINS][s][t] = _mm256_fmadd_ps(code, xs[t], acc[j % CHAINS][s][t]);
          });
        });
      });
    }
    UNROLL(STREAMS, s, {
      const int64_t at = ((first + s * stride) * w.groups + g) * QWENRT_BLOCK;
      const __m256 scale = load_scales(w, at);
      const __m256 zero = load_zeros(w, at);
      UNROLL(TILE, t, {
        __m256 sum = acc[0][s][t];
        for (int c = 1; c < CHAINS; ++c) sum = _mm256_add_ps(sum, acc[c][s][t]);
        sum = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(sums + g * TILE + t), sum);
        total[s][t] = _mm256_fmadd_ps(scale, sum, total[s][t]);
      });
    });
  }
  UNROLL(STREAMS, s, {
    UNROLL(TILE, t, {
      if (tile * TILE + t < in.tokens)
        store_rows(w, y + (tile * TILE + t) * w.out_features, total[s][t], (first + s * stride) * QWENRT_BLOCK);
    });
  });
}

template <int BITS, int TILE, int STREAMS>
void rows_of(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / STREAMS;
  for (int64_t b = begin; b < begin + stride; ++b)
    for (int64_t tile = 0; tile < in.tiles; ++tile)
      blocks_times_tile<BITS, TILE, STREAMS>(w, in, y, b, stride, tile);
  for (int64_t b = begin + stride * STREAMS; b < end; ++b)
    for (int64_t tile = 0; tile < in.tiles; ++tile) blocks_times_tile<BITS, TILE, 1>(w, in, y, b, 0, tile);
}

template <int BITS>
void rows_by_tile(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  if (in.tile == 1) return rows_of<BITS, 1, 4>(w, in, y, begin, end);
  if (in.tile == 2) return rows_of<BITS, 2, 4>(w, in, y, begin, end);
  return rows_of<BITS, 4, 2>(w, in, y, begin, end);
}

void quant_rows(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  if (w.bits == 4) return rows_by_tile<4>(w, in, y, begin, end);
  return rows_by_tile<8>(w, in, y, begin, end);
}

template <bool HALF>
inline __m256 load16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (HALF) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <bool HALF>
inline float value16(const uint16_t* p) {
  alignas(16) uint16_t lanes[8] = {*p};
  return _mm256_cvtss_f32(load16<HALF>(lanes));
}

// STREAMS rows, `stride` apart, times TILE tokens: vectors run along the inputs.
template <bool HALF, int TILE, int STREAMS>
void dense_rows_times_tile(const uint16_t* w, const float* bias, const float* x, float* y, int64_t out_features,
                           int64_t in_features, int64_t first, int64_t stride) {
  constexpr int CHAINS = TILE == 1 ? 2 : 1;
  constexpr int STEP = 8 * CHAINS;
  __m256 acc[CHAINS][STREAMS][TILE];
  UNROLL(CHAINS, c, { UNROLL(STREAMS, s, { UNROLL(TILE, t, { acc[c][s][t] = _mm256_setzero_ps(); }); }); });
  const uint16_t* rows[STREAMS];
  UNROLL(STREAMS, s, { rows[s] = w + (first + s * stride) * in_features; });
  int64_t k = 0;
  for (; k + STEP <= in_features; k += STEP)
    UNROLL(CHAINS, c, {
      __m256 xs[TILE];
      UNROLL(TILE, t, { xs[t] = _mm256_loadu_ps(x + t * in_features + k + 8 * c); });
      UNROLL(STREAMS, s, {
        const __m256 value = load16<HALF>(rows[s] + k + 8 * c);
        UNROLL(TILE, t, { acc[c][s][t] = _mm256_fmadd_ps(value, xs[t], acc[c][s][t]); });
      });
    });
  UNROLL(STREAMS, s, {
    const int64_t n = first + s * stride;
    UNROLL(TILE, t, {
      __m256 all = acc[0][s][t];
      for (int c = 1; c < CHAINS; ++c) all = _mm256_add_ps(all, acc[c][s][t]);
      float sum = sum8(all);
      for (int64_t i = k; i < in_features; ++i) sum += value16<HALF>(rows[s] + i) * x[t * in_features + i];
      y[t * out_features + n] = bias ? sum + bias[n] : sum;
    });
  });
}

template <bool HALF, int TILE, int STREAMS>
void dense_tile(const uint16_t* w, const float* bias, const float* x, float* y, int64_t out_features,
                int64_t in_features, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / STREAMS;
  for (int64_t n = begin; n < begin + stride; ++n)
    dense_rows_times_tile<HALF, TILE, STREAMS>(w, bias, x, y, out_features, in_features, n, stride);
  for (int64_t n = begin + stride * STREAMS; n < end; ++n)
    dense_rows_times_tile<HALF, TILE, 1>(w, bias, x, y, out_features, in_features, n, 0);
}

constexpr int64_t kRowsInCache = 64 * 1024;  // elements of W that are kept in the cache for the next tile of tokens

template <bool HALF>
void dense_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens, int64_t out_features,
                int64_t in_features, int64_t begin, int64_t end) {
  int64_t step = end - begin;
  if (tokens > 4) step = kRowsInCache / (in_features + 1) > 8 ? kRowsInCache / (in_features + 1) : 8;
  for (; begin < end; begin += step) {
    const int64_t last = begin + step < end ? begin + step : end;
    for (int64_t t = 0; t < tokens;) {
      const int64_t tile = tokens - t >= 4 ? 4 : (tokens - t >= 2 ? 2 : 1);
      const float* tile_x = x + t * in_features;
      float* tile_y = y + t * out_features;
      if (tile == 4) dense_tile<HALF, 4, 2>(w, bias, tile_x, tile_y, out_features, in_features, begin, last);
      if (tile == 2) dense_tile<HALF, 2, 4>(w, bias, tile_x, tile_y, out_features, in_features, begin, last);
      if (tile == 1) dense_tile<HALF, 1, 4>(w, bias, tile_x, tile_y, out_features, in_features, begin, last);
      t += tile;
    }
  }
}

void dense16_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens, int64_t out_features,
                  int64_t in_features, int is_half, int64_t begin, int64_t end) {
  if (is_half) return dense_rows<true>(w, bias, x, y, tokens, out_features, in_features, begin, end);
  return dense_rows<false>(w, bias, x, y, tokens, out_features, in_features, begin, end);
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", quant_rows, dense16_rows, avx2_round_block, avx2_integer_rows, 1};
  return &kernels;
}
#endif
