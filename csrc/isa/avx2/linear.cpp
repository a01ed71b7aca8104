// AVX2, FMA and F16C kernels.
//
// A quantised word is never unpacked: code j is masked where it lies, converted to float as code * 2^(bits * j), and
// multiplied by an activation that already carries 2^(-bits * j). Each 8 rows x 1 input cost one and, one convert and
// one multiply-add. A thread reads several distant row blocks at once, because one sequential stream per core does not
// fill the memory bus.
#include "isa/avx2/vectors.h"

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

  GroupScales group(w, first * w.groups, stride * w.groups);
  int64_t offset = 0;
  for (int64_t g = 0; g < w.groups; ++g, group.advance()) {
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
      const __m256 scale = group.scales(s);
      const __m256 zero = group.zeros(s);
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

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2",           quant_rows,        avx2_dense16_rows, avx2_fixed_rows,   nullptr,
                                  avx2_round_block, avx2_integer_rows, avx2_dense12_rows, avx2_unpack12,
                                  1,                avx2_dense_tiles_from, 0};
  return &kernels;
}
#endif
