// AVX2 kernels that multiply codes with activations rounded to int16 or int8.
//
// Codes are masked where they lie: each 32-bit lane is one row and holds two 16-bit or four 8-bit codes, which one
// instruction multiplies with as many activations and adds up. Sums of a block are exact in int32.
#include "kernels_avx2.h"

#ifdef QWENRT_X86

namespace {

// Multiplies and adds are written out, so that the compiler neither reorders them nor keeps more sums in registers
// than there are.
INLINE void add_products16(__m256i& sum, __m256i codes, __m256i x) {
  __m256i product;
  asm("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(codes), "x"(x));
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
}

INLINE void add_products8(__m256i& sum, __m256i codes, __m256i x) {
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(codes), "x"(x));  // unsigned codes, signed activations
  asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
}

INLINE __m256i broadcast(const int32_t* x) {
  __m256i all;
  asm("vpbroadcastd %1, %0" : "=x"(all) : "m"(*x));
  return all;
}

// The codes of one place of a word, as the activations of IntegerInput lie. A word is loaded anew for each place, out of
// the first cache: with 8 sums there is no register to keep it in.
template <int BITS, bool BYTES, int P>
INLINE __m256i codes_at(const uint32_t* words) {
  __m256i word;
  asm("vmovdqu %1, %0" : "=x"(word) : "m"(*reinterpret_cast<const __m256i_u*>(words)));
  const __m256i mask = _mm256_set1_epi32(BYTES ? 0x0f0f0f0f : (BITS == 4 ? 0x000f000f : 0x00ff00ff));
  constexpr int last = (BYTES ? 8 : 16) / BITS - 1;
  if constexpr (!BYTES && P == last) return _mm256_srli_epi16(word, BITS * P);
  else if constexpr (P > 0) return _mm256_and_si256(_mm256_srli_epi32(word, BITS * P), mask);
  else return _mm256_and_si256(word, mask);
}

// sums += the products of COUNT words. With int8, sums are of int16: 4 words are 8 products of at most
// 2 * 15 * 127 each, 30480 in all.
template <int BITS, bool BYTES, int TILE, int STREAMS>
INLINE void add_word(const uint32_t* const (&words)[STREAMS], int64_t offset, const int32_t* x,
                     __m256i (&sums)[STREAMS][TILE]) {
  constexpr int PLACES = (BYTES ? 8 : 16) / BITS;
  UNROLL(PLACES, p, {
    __m256i codes[STREAMS];
    UNROLL(STREAMS, s, { codes[s] = codes_at<BITS, BYTES, p>(words[s] + offset); });
    UNROLL(TILE, t, {
      const __m256i xs = broadcast(x + p * TILE + t);
      UNROLL(STREAMS, s, {
        if constexpr (BYTES) add_products8(sums[s][t], codes[s], xs);
        else add_products16(sums[s][t], codes[s], xs);
      });
    });
  });
}

template <int BITS, bool BYTES, int TILE, int STREAMS>
INLINE void block_products(const uint32_t* const (&words)[STREAMS], int64_t offset, const int32_t* x, int64_t count,
                           __m256i (&sums)[STREAMS][TILE]) {
  constexpr int PLACES = (BYTES ? 8 : 16) / BITS;
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { sums[s][t] = _mm256_setzero_si256(); }); });
  if constexpr (!BYTES) {
    for (int64_t i = 0; i < count; ++i, offset += QWENRT_BLOCK, x += PLACES * TILE)
      add_word<BITS, BYTES>(words, offset, x, sums);
    return;
  }
  while (count > 0) {
    __m256i narrow[STREAMS][TILE];
    UNROLL(STREAMS, s, { UNROLL(TILE, t, { narrow[s][t] = _mm256_setzero_si256(); }); });
    const int64_t now = count < 4 ? count : 4;
    for (int64_t i = 0; i < now; ++i, offset += QWENRT_BLOCK, x += PLACES * TILE)
      add_word<BITS, BYTES>(words, offset, x, narrow);
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL(STREAMS, s, {
      UNROLL(TILE, t, { sums[s][t] = _mm256_add_epi32(sums[s][t], _mm256_madd_epi16(narrow[s][t], ones)); });
    });
    count -= now;
  }
}

INLINE __m256i load_int_zeros(const QwenrtQuantMatrix& w, int64_t i) {
  if (!w.zeros) return _mm256_set1_epi32(w.zero);
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + i)));
}

// Adds blocks [first, last) of one tile to `totals` [STREAMS][TILE][8 rows]; row blocks are `stride` apart.
template <int BITS, bool BYTES, int TILE, int STREAMS>
INLINE void add_blocks(const QwenrtQuantMatrix& w, const IntegerInput& in, float* totals, int64_t row_block,
                       int64_t stride, int64_t tile, int64_t first, int64_t last) {
  constexpr int PLACES = (BYTES ? 8 : 16) / BITS;
  const int64_t row_words = w.groups * w.words_per_group;
  const int64_t blocks = w.groups * in.blocks_per_group;
  const uint32_t* words[STREAMS];
  for (int s = 0; s < STREAMS; ++s) words[s] = w.words + (row_block + s * stride) * row_words * QWENRT_BLOCK;
  int64_t g = first / in.blocks_per_group, part = first % in.blocks_per_group;
  for (int64_t b = first; b < last; ++b) {
    const int64_t skipped = part * in.words_per_block, word = g * w.words_per_group + skipped;
    const int64_t rest = w.words_per_group - skipped;
    __m256i sums[STREAMS][TILE];
    block_products<BITS, BYTES>(words, word * QWENRT_BLOCK, in.x + (tile * row_words + word) * PLACES * TILE,
                                rest < in.words_per_block ? rest : in.words_per_block, sums);
    const int64_t at = (tile * blocks + b) * TILE;
    UNROLL(STREAMS, s, {
      const int64_t i = ((row_block + s * stride) * w.groups + g) * QWENRT_BLOCK;
      const __m256 scale = load_scales(w, i);
      const __m256i zero = load_int_zeros(w, i);
      UNROLL(TILE, t, {
        const __m256i zeros = _mm256_mullo_epi32(zero, _mm256_set1_epi32(in.sums[at + t]));
        const __m256 product = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[s][t], zeros));
        const __m256 both = _mm256_mul_ps(scale, _mm256_broadcast_ss(in.scales + at + t));
        float* total = totals + (s * TILE + t) * QWENRT_BLOCK;
        _mm256_store_ps(total, _mm256_fmadd_ps(both, product, _mm256_load_ps(total)));
      });
    });
    if (++part == in.blocks_per_group) part = 0, ++g;
  }
}

template <int TILE, int STREAMS>
INLINE void store_tile(const QwenrtQuantMatrix& w, const IntegerInput& in, const float* totals, float* y,
                       int64_t row_block, int64_t stride, int64_t tile) {
  UNROLL(STREAMS, s, {
    UNROLL(TILE, t, {
      if (tile * TILE + t < in.tokens)
        store_rows(w, y + (tile * TILE + t) * w.out_features, _mm256_load_ps(totals + (s * TILE + t) * QWENRT_BLOCK),
                   (row_block + s * stride) * QWENRT_BLOCK);
    });
  });
}

// Few tokens: the weights are read once, from STREAMS distant places.
template <int BITS, bool BYTES, int TILE, int STREAMS>
void distant_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / STREAMS, blocks = w.groups * in.blocks_per_group;
  for (int64_t b = begin; b < begin + stride; ++b) {
    alignas(32) float totals[STREAMS * TILE * QWENRT_BLOCK] = {};
    add_blocks<BITS, BYTES, TILE, STREAMS>(w, in, totals, b, stride, 0, 0, blocks);
    store_tile<TILE, STREAMS>(w, in, totals, y, b, stride, 0);
  }
  for (int64_t b = begin + stride * STREAMS; b < end; ++b) {
    alignas(32) float totals[TILE * QWENRT_BLOCK] = {};
    add_blocks<BITS, BYTES, TILE, 1>(w, in, totals, b, 0, 0, 0, blocks);
    store_tile<TILE, 1>(w, in, totals, y, b, 0, 0);
  }
}

constexpr int64_t kSlabBlocks = 8;  // 1024 inputs: the words of 16 rows stay in the first cache while all tokens pass

// Many tokens: STREAMS neighbouring row blocks times all tiles, slab by slab of the inputs.
template <int BITS, bool BYTES, int STREAMS>
void neighbouring_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t row_block) {
  constexpr int TILE = 4, FLOATS = STREAMS * TILE * QWENRT_BLOCK;
  alignas(32) float totals[kIntegerTokens / TILE * FLOATS];
  for (int64_t i = 0; i < in.tiles * FLOATS; ++i) totals[i] = 0;
  const int64_t blocks = w.groups * in.blocks_per_group;
  for (int64_t first = 0; first < blocks; first += kSlabBlocks) {
    const int64_t last = first + kSlabBlocks < blocks ? first + kSlabBlocks : blocks;
    for (int64_t tile = 0; tile < in.tiles; ++tile)
      add_blocks<BITS, BYTES, TILE, STREAMS>(w, in, totals + tile * FLOATS, row_block, 1, tile, first, last);
  }
  for (int64_t tile = 0; tile < in.tiles; ++tile)
    store_tile<TILE, STREAMS>(w, in, totals + tile * FLOATS, y, row_block, 1, tile);
}

template <int BITS, bool BYTES>
void rows_of(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  if (in.tile == 1) return distant_rows<BITS, BYTES, 1, 4>(w, in, y, begin, end);
  if (in.tile == 2) return distant_rows<BITS, BYTES, 2, 4>(w, in, y, begin, end);
  if (in.tiles == 1) return distant_rows<BITS, BYTES, 4, 2>(w, in, y, begin, end);
  for (; begin + 2 <= end; begin += 2) neighbouring_rows<BITS, BYTES, 2>(w, in, y, begin);
  if (begin < end) neighbouring_rows<BITS, BYTES, 1>(w, in, y, begin);
}

}  // namespace

void avx2_integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  if (w.bits == 8) return rows_of<8, false>(w, in, y, begin, end);
  if (in.bytes) return rows_of<4, true>(w, in, y, begin, end);
  return rows_of<4, false>(w, in, y, begin, end);
}

int avx2_quantize_block(const float* x, int64_t n, float limit, int32_t* q, float* scale, int32_t* sum) {
  // The bits of |x| are in the order of |x|, with infinity and then NaN above all numbers.
  __m256i most = _mm256_setzero_si256();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
  }
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
  if (!(largest <= kLargestActivation)) return 0;
  const bool zeros = largest < kSmallestActivation;
  *scale = zeros ? 0.0f : largest / limit;
  const __m256 inverse = _mm256_set1_ps(zeros ? 0.0f : limit / largest);
  __m256i all = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), rounded);
    all = _mm256_add_epi32(all, rounded);
  }
  four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  *sum = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  return 1;
}
#endif
