// AVX2 kernels of bfloat16 weights in 12 bits: a shuffle looks up the upper bytes, unpacking joins them with the lower
// ones.
#include "isa/avx2/vectors.h"
#include "linear/half.h"

#ifdef QWENRT_X86

namespace {

// The upper bytes, by code.
INLINE __m256i palette_of(const QwenrtDense12& w) {
  const __m128i above = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124, -123, -122, -121);
  return _mm256_broadcastsi128_si256(_mm_add_epi8(above, _mm_set1_epi8(char(w.smallest))));
}

// Half H of a chunk, whose codes are `codes`: 32 weights as two registers of bfloat16: inputs 0 to 7 are every other
// one of the first, 8 to 15 those between; then the same of the next 16.
template <int H>
INLINE void join_bytes(const uint8_t* chunk, __m256i codes, __m256i palette, __m256i (&words)[2]) {
  const __m256i code = _mm256_and_si256(H ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
  const __m256i upper = _mm256_shuffle_epi8(palette, code), lower = load256(chunk + 32 + 32 * H);
  words[0] = _mm256_unpacklo_epi8(lower, upper);
  words[1] = _mm256_unpackhi_epi8(lower, upper);
}

INLINE float bfloat(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

// The sum of row n with one token's x, completed by the weights that have no code.
INLINE void store_sum(const QwenrtDense12& w, float sum, const float* x, float* y, int64_t n) {
  const float stand_in = bfloat(uint16_t(w.smallest << 8));
  for (int64_t e = w.first[n]; e < w.first[n + 1]; ++e) sum += (bfloat(w.weights[e]) - stand_in) * x[w.inputs[e]];
  y[n] = w.bias ? sum + w.bias[n] : sum;
}

// For the chunk after the next three: a core's own guesses do not keep enough lines on their way.
template <bool ONCE>
INLINE void ask_ahead(const uint8_t* chunk) {
  const char* const at = reinterpret_cast<const char*>(chunk + 4 * QWENRT_CHUNK_BYTES);
  ask_for<ONCE>(at);
  ask_for<ONCE>(at + 64);
}

// STREAMS rows, `stride` apart, times TILE tokens: vectors run along the inputs.
template <int TILE, int STREAMS, bool ONCE>
void dense12_rows_times_tile(const QwenrtDense12& w, const float* x, float* y, int64_t first, int64_t stride) {
  constexpr int CHAINS = TILE == 1 ? 2 : 1;
  const int64_t row_bytes = chunks_of(w) * QWENRT_CHUNK_BYTES, distance = stride * row_bytes,
                x_stride = token_stride12(w);
  const __m256i palette = palette_of(w), upper_halves = _mm256_set1_epi32(int(0xffff0000));
  __m256 acc[CHAINS][STREAMS][TILE];
  UNROLL(CHAINS, c, { UNROLL(STREAMS, s, { UNROLL(TILE, t, { acc[c][s][t] = _mm256_setzero_ps(); }); }); });
  const uint8_t* chunk = w.chunks + first * row_bytes;
  const float* in[TILE];
  UNROLL(TILE, t, { in[t] = x + t * x_stride; });
  for (int64_t rest = chunks_of(w); rest > 0; --rest) {
    UNROLL(STREAMS, s, {
      const uint8_t* const row = chunk + s * distance;
      if constexpr (TILE == 1) ask_ahead<ONCE>(row);
      const __m256i codes = load256(row);
      UNROLL(2, h, {
        __m256i words[2];
        join_bytes<h>(row, codes, palette, words);
        UNROLL(4, j, {
          const __m256i one =
              j % 2 ? _mm256_and_si256(words[j / 2], upper_halves) : _mm256_slli_epi32(words[j / 2], 16);
          UNROLL(TILE, t, {
            const __m256 xs = _mm256_loadu_ps(in[t] + 32 * h + 8 * j);
            acc[j % CHAINS][s][t] = _mm256_fmadd_ps(_mm256_castsi256_ps(one), xs, acc[j % CHAINS][s][t]);
          });
        });
      });
    });
    chunk += QWENRT_CHUNK_BYTES;
    UNROLL(TILE, t, { in[t] += QWENRT_CHUNK, stay(chunk, in[t]); });
  }
  UNROLL(STREAMS, s, {
    UNROLL(TILE, t, {
      const __m256 together = CHAINS == 2 ? _mm256_add_ps(acc[0][s][t], acc[CHAINS - 1][s][t]) : acc[0][s][t];
      store_sum(w, sum(together), x + t * x_stride, y + t * w.out_features, first + s * stride);
    });
  });
}

template <int TILE, int STREAMS, bool ONCE = false>
void dense12_tile(const QwenrtDense12& w, const float* x, float* y, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / STREAMS;
  for (int64_t n = begin; n < begin + stride; ++n) dense12_rows_times_tile<TILE, STREAMS, ONCE>(w, x, y, n, stride);
  for (int64_t n = begin + stride * STREAMS; n < end; ++n) dense12_rows_times_tile<TILE, 1, ONCE>(w, x, y, n, 0);
}

constexpr int64_t kRowsInCache = 24;  // for the next tile

}  // namespace

void avx2_dense12_rows(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t step = tokens > 4 ? kRowsInCache : end - begin;
  for (; begin < end; begin += step) {
    const int64_t last = begin + step < end ? begin + step : end;
    for (int64_t t = 0, tile; t < tokens; t += tile) {
      tile = dense_tile_of(tokens - t);
      const auto run = tile == 1   ? (hint_once() ? dense12_tile<1, 4, true> : dense12_tile<1, 4>)
                       : tile == 2 ? dense12_tile<2, 4>
                       : tile == 3 ? dense12_tile<3, 4>
                                   : dense12_tile<4, 3>;
      run(w, x + t * token_stride12(w), y + t * w.out_features, begin, last);
    }
  }
}

void avx2_unpack12(const QwenrtDense12& w, int64_t row, uint16_t* out) {
  const __m256i palette = palette_of(w);
  const __m128i every_other = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const uint8_t* chunk = w.chunks + row * chunks_of(w) * QWENRT_CHUNK_BYTES;
  for (int64_t i = 0; i < w.in_features; i += QWENRT_CHUNK, chunk += QWENRT_CHUNK_BYTES) {
    uint16_t last[QWENRT_CHUNK];
    uint16_t* const to = w.in_features - i < QWENRT_CHUNK ? last : out + i;
    const __m256i codes = load256(chunk);
    UNROLL(2, h, {
      __m256i words[2];
      join_bytes<h>(chunk, codes, palette, words);
      UNROLL(2, j, {
        const __m256i pairs = _mm256_shuffle_epi8(words[j], _mm256_broadcastsi128_si256(every_other));
        const __m256i in_order = _mm256_permute4x64_epi64(pairs, 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h + 16 * j), in_order);
      });
    });
    if (to == last) __builtin_memcpy(out + i, last, size_t(w.in_features - i) * sizeof *out);
  }
}
#endif
