// AVX2 kernels that multiply codes with rounded activations.
//
// Codes are masked where they lie: each 32-bit lane is one row and holds four 4-bit or two 8-bit codes, which one
// instruction multiplies with as many activations and adds up. Sums of a block are exact.
#include "linear/integer_places.h"
#include "isa/avx2/vectors.h"

#ifdef QWENRT_X86

namespace {

// Multiplies and adds are written out, so that the compiler neither reorders them nor keeps more sums in registers
// than there are.
INLINE __m256i times_bytes(__m256i codes, __m256i x) {  // unsigned codes, signed activations; sums of two in int16
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(codes), "x"(x));
  return product;
}

INLINE void add_bytes(__m256i& sum, __m256i codes, __m256i x) {
  asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(times_bytes(codes, x)));
}

INLINE void add_pairs(__m256i& sum, __m256i codes, __m256i x) {
  __m256i product;
  asm("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(codes), "x"(x));
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
}

INLINE __m256i broadcast(const int32_t* x) {
  __m256i all;
  asm("vpbroadcastd %1, %0" : "=x"(all) : "m"(*x));
  return all;
}

// Scales and zeros of the next group of row blocks that are `stride` groups from each other.
struct GroupScales {
  const char* scale;
  int64_t scale_bytes, scale_stride;
  const char* zero;
  int64_t zero_bytes, zero_stride;
  bool in_scales;  // where `zero` points then
  __m256 all_zeros;

  INLINE GroupScales(const QwenrtQuantMatrix& w, int64_t first, int64_t stride) {
    scale_bytes = QWENRT_BLOCK * (w.scales_are_float ? 4 : 2);
    scale = static_cast<const char*>(w.scales) + first * scale_bytes;
    scale_stride = stride * scale_bytes;
    in_scales = !w.zeros && w.zero == QWENRT_ZEROS_IN_SCALES;
    zero_bytes = QWENRT_BLOCK * (w.zeros && w.zeros_are_float ? 4 : 2);
    const char* const zeros = static_cast<const char*>(in_scales ? w.scales : w.zeros);
    zero = zeros ? zeros + first * zero_bytes : nullptr;
    zero_stride = stride * zero_bytes;
    all_zeros = _mm256_set1_ps(float(w.zero));
  }
  INLINE __m256 scales(int s) const {
    const char* at = scale + s * scale_stride;
    if (scale_bytes == QWENRT_BLOCK * 4) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  INLINE __m256 zeros(int s) const {
    if (!zero) return all_zeros;
    const char* at = zero + s * zero_stride;
    if (zero_bytes == QWENRT_BLOCK * 4) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if (in_scales) zeros = _mm_and_si128(zeros, _mm_set1_epi16(15));
    return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(zeros));
  }
  INLINE void advance() {
    scale += scale_bytes;
    if (zero) zero += zero_bytes;
  }
};

// Row blocks that are read at once: STREAMS of them, `stride` words from each other.
template <int STREAMS>
struct Streams {
  const uint32_t* first;
  int64_t stride;
  bool once;  // a constant where they are asked for: as of ask_for

  INLINE Streams ahead(int64_t words) const { return {first + words, stride, once}; }
  INLINE Streams<1> only(int s) const { return {first + s * stride, 0, once}; }
  INLINE __m256i load(int s) const {
    __m256i word;
    asm("vmovdqu %1, %0" : "=x"(word) : "m"(*reinterpret_cast<const __m256i_u*>(first + s * stride)));
    return word;
  }
  // Asks for the line `bytes` further on: a core's own guesses do not keep enough of them on their way.
  INLINE void ask(int64_t bytes) const {
    UNROLL(STREAMS, s, {
      const char* const line = reinterpret_cast<const char*>(first + s * stride) + bytes;
      if (once) ask_for<true>(line);
      else ask_for<false>(line);
    });
  }
};

// The codes of one place of a word.
template <int BITS, int P>
INLINE __m256i codes_at(__m256i word) {
  if constexpr (BITS == 8 && P == 1) return _mm256_srli_epi16(word, 8);
  const __m256i mask = _mm256_set1_epi32(BITS == 4 ? 0x0f0f0f0f : 0x00ff00ff);
  if constexpr (P > 0) return _mm256_and_si256(_mm256_srli_epi32(word, BITS * P), mask);
  return _mm256_and_si256(word, mask);
}

constexpr int kPlaces = 2;             // of 4-bit codes as bytes and of 8-bit ones as pairs
constexpr int kByteWords = 4;          // of a block; 8 products of at most 2 * 15 * 128 fit in int16

// sums (or, the first time, what is to become them) and the products of one word's codes with bytes x, of which a tile
// has one every LANES.
template <bool FIRST, int LANES, int TILE, int STREAMS>
INLINE void add_word(const Streams<STREAMS>& words, const int32_t* x,
                     __m256i (&sums)[STREAMS][TILE]) {
  if constexpr (TILE == 1) {  // a word is loaded once
    const __m256i x0 = broadcast(x), x1 = broadcast(x + LANES);
    UNROLL(STREAMS, s, {
      const __m256i word = words.load(s);
      if constexpr (FIRST) sums[s][0] = times_bytes(codes_at<4, 0>(word), x0);
      else add_bytes(sums[s][0], codes_at<4, 0>(word), x0);
      add_bytes(sums[s][0], codes_at<4, 1>(word), x1);
    });
  } else {  // once for each place, out of the first cache: with 8 sums there is no register to keep it in
    UNROLL(kPlaces, p, {
      __m256i codes[STREAMS];
      UNROLL(STREAMS, s, { codes[s] = codes_at<4, p>(words.load(s)); });
      UNROLL(TILE, t, {
        const __m256i xs = broadcast(x + p * TILE + t);
        UNROLL(STREAMS, s, {
          if constexpr (FIRST && p == 0) sums[s][t] = times_bytes(codes[s], xs);
          else add_bytes(sums[s][t], codes[s], xs);
        });
      });
    });
  }
}

// The dot products of `count` <= kByteWords words with bytes, in int32.
template <int TILE, int STREAMS, int LANES = TILE>
INLINE void byte_products(const Streams<STREAMS>& words, const int32_t* x, int64_t count,
                          __m256i (&sums)[STREAMS][TILE]) {
  if (count == kByteWords) {
    UNROLL(kByteWords, i, { add_word<i == 0, LANES>(words.ahead(i * QWENRT_BLOCK), x + i * kPlaces * LANES, sums); });
  } else {
    UNROLL(STREAMS, s, { UNROLL(TILE, t, { sums[s][t] = _mm256_setzero_si256(); }); });
    for (int64_t i = 0; i < count; ++i)
      add_word<false, LANES>(words.ahead(i * QWENRT_BLOCK), x + i * kPlaces * LANES, sums);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { sums[s][t] = _mm256_madd_epi16(sums[s][t], ones); }); });
}

// Both bytes of a wide block at once: its codes are masked once.
template <int TILE, int STREAMS>
INLINE void wide_products(const Streams<STREAMS>& words, const int32_t* low,
                          const int32_t* high, int64_t count, __m256i (&sums)[STREAMS][TILE]) {
  __m256i upper[STREAMS][TILE];
  if (count < kByteWords) {
    byte_products(words, low, count, sums);
    byte_products(words, high, count, upper);
    UNROLL(STREAMS, s, {
      UNROLL(TILE, t, { sums[s][t] = _mm256_add_epi32(sums[s][t], _mm256_slli_epi32(upper[s][t], 8)); });
    });
    return;
  }
  UNROLL(kByteWords * kPlaces, n, {
    constexpr int i = n / kPlaces, p = n % kPlaces;
    __m256i codes[STREAMS];
    UNROLL(STREAMS, s, { codes[s] = codes_at<4, p>(words.ahead(i * QWENRT_BLOCK).load(s)); });
    UNROLL(TILE, t, {
      const __m256i l = broadcast(low + n * TILE + t);
      const __m256i h = broadcast(high + n * TILE + t);
      UNROLL(STREAMS, s, {
        if constexpr (n == 0) {
          sums[s][t] = times_bytes(codes[s], l);
          upper[s][t] = times_bytes(codes[s], h);
        } else {
          add_bytes(sums[s][t], codes[s], l);
          add_bytes(upper[s][t], codes[s], h);
        }
      });
    });
  });
  const __m256i ones = _mm256_set1_epi16(1), bytes = _mm256_set1_epi16(256);
  UNROLL(STREAMS, s, {
    UNROLL(TILE, t, {
      const __m256i h = _mm256_madd_epi16(upper[s][t], bytes);
      sums[s][t] = _mm256_add_epi32(_mm256_madd_epi16(sums[s][t], ones), h);
    });
  });
}

// sums += the products of one word's codes with pairs x.
template <int TILE, int STREAMS>
INLINE void add_pair_word(const Streams<STREAMS>& words, const int32_t* x,
                          __m256i (&sums)[STREAMS][TILE]) {
  UNROLL(kPlaces, p, {
    __m256i codes[STREAMS];
    UNROLL(STREAMS, s, { codes[s] = codes_at<8, p>(words.load(s)); });
    UNROLL(TILE, t, {
      const __m256i xs = broadcast(x + p * TILE + t);
      UNROLL(STREAMS, s, { add_pairs(sums[s][t], codes[s], xs); });
    });
  });
}

template <int TILE, int STREAMS>
INLINE void pair_products(const Streams<STREAMS>& words, const int32_t* x, int64_t count,
                          __m256i (&sums)[STREAMS][TILE]) {
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { sums[s][t] = _mm256_setzero_si256(); }); });
  constexpr int AT_ONCE = TILE == 1 ? 2 : 1;  // two are a line of the cache
  Streams<STREAMS> at = words;
  for (; count >= AT_ONCE; count -= AT_ONCE) {
    if constexpr (TILE == 1) at.ask(512);
    UNROLL(AT_ONCE, i, { add_pair_word(at.ahead(i * QWENRT_BLOCK), x + i * kPlaces * TILE, sums); });
    at = at.ahead(AT_ONCE * QWENRT_BLOCK), x += AT_ONCE * kPlaces * TILE;
    stay(at.first, x);
  }
  if (AT_ONCE == 2 && count) add_pair_word(at, x, sums);
}

// Vectors of 8 rows' sums: in registers where there are some left for them.
template <int STREAMS, int TILE>
struct Sums {
  alignas(32) float lanes[STREAMS * TILE * QWENRT_BLOCK];
  INLINE __m256 at(int s, int t) const { return _mm256_load_ps(lanes + (s * TILE + t) * QWENRT_BLOCK); }
  INLINE void set(int s, int t, __m256 sum) { _mm256_store_ps(lanes + (s * TILE + t) * QWENRT_BLOCK, sum); }
};
template <int STREAMS>
struct Sums<STREAMS, 1> {
  __m256 lanes[STREAMS];
  INLINE __m256 at(int s, int) const { return lanes[s]; }
  INLINE void set(int s, int, __m256 sum) { lanes[s] = sum; }
};

// Where the next block begins: in STREAMS rows of words and in the activations of a tile. Both are without gaps.
template <int STREAMS>
struct Cursor {
  Streams<STREAMS> words;
  const int32_t* low;
  int64_t upper;  // from `low` on to the upper bytes
  const float* scales;
  const uint8_t* wide;

  INLINE const int32_t* high() const { return low + upper; }
};

// sums[first...] += scale * the dot products of one block.
template <int COUNT, int TILE, int STREAMS>
INLINE void add_scaled(const __m256i (&products)[COUNT][TILE], const float* scales, int first,
                       Sums<STREAMS, TILE>& sums) {
  UNROLL(TILE, t, {
    const __m256 scale = _mm256_broadcast_ss(scales + t);
    UNROLL(COUNT, s, {
      sums.set(first + s, t, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(products[s][t]), sums.at(first + s, t)));
    });
  });
}

// As add_scaled of a whole block that few tokens have wide: each of these costs a pass of its own.
template <int TILE, int STREAMS>
INLINE void add_few_wide(const Cursor<STREAMS>& c, Sums<STREAMS, TILE>& sums) {
  __m256i products[STREAMS][TILE], dots[TILE][STREAMS];  // the one in registers, the other in memory
  byte_products(c.words, c.low, kByteWords, products);
  UNROLL(TILE, t, { UNROLL(STREAMS, s, { _mm256_store_si256(&dots[t][s], products[s][t]); }); });
  for (int t = 0; t < TILE; ++t) {
    if (!(*c.wide >> t & 1)) continue;
    __m256i upper[STREAMS][1];
    byte_products<1, STREAMS, TILE>(c.words, c.high() + t, kByteWords, upper);
    UNROLL(STREAMS, s, { dots[t][s] = _mm256_add_epi32(dots[t][s], _mm256_slli_epi32(upper[s][0], 8)); });
  }
  UNROLL(TILE, t, {
    const __m256 scale = _mm256_broadcast_ss(c.scales + t);
    UNROLL(STREAMS, s, { sums.set(s, t, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[t][s]), sums.at(s, t))); });
  });
}

// sums += scale * dot product of one block of `count` words, and on to the next.
template <int BITS, int TILE, int STREAMS>
INLINE void add_block(Cursor<STREAMS>& c, int64_t count, Sums<STREAMS, TILE>& sums) {
  if constexpr (BITS == 4 && TILE == 1) {
    UNROLL(kByteWords / 2, line, { c.words.ask(1024 + 64 * line); });
  }
  if (BITS == 8 || !*c.wide) {
    __m256i products[STREAMS][TILE];
    if constexpr (BITS == 8) pair_products(c.words, c.low, count, products);
    else byte_products(c.words, c.low, count, products);
    add_scaled(products, c.scales, 0, sums);
  } else if constexpr (TILE == 1) {
    __m256i products[STREAMS][TILE];
    wide_products(c.words, c.low, c.high(), count, products);
    add_scaled(products, c.scales, 0, sums);
  } else if (TILE < 4 || __builtin_popcount(*c.wide) > 2 || count < kByteWords) {
    UNROLL(STREAMS, s, {  // one after the other: the sums of more do not fit into the registers
      stay(c.low, c.upper);  // else the compiler keeps each one's activations for the next, in memory
      __m256i products[1][TILE];
      wide_products(c.words.only(s), c.low, c.high(), count, products);
      add_scaled(products, c.scales, s, sums);
    });
  } else {
    add_few_wide(c, sums);
  }
  c.words.first += count * QWENRT_BLOCK;
  c.low += count * kPlaces * TILE;
  c.scales += TILE;
  ++c.wide;
  stay(c.words.first, c.low), stay(c.scales, c.wide);
}

// Adds groups [first, last) of one tile to `totals` [STREAMS][TILE][8 rows]; row blocks are `stride` apart.
template <int BITS, int TILE, int STREAMS, bool WHOLE>
INLINE void add_groups(const QwenrtQuantMatrix& w, const IntegerInput& in, float* totals, int64_t row_block,
                       int64_t stride, int64_t tile, int64_t first, int64_t last, bool once) {
  constexpr int64_t MOST = (BITS == 4 ? kByteBlock : kPairBlock) * BITS / 32;
  const int64_t row_words = w.groups * w.words_per_group, blocks = w.groups * in.blocks_per_group;
  const int64_t word = first * w.words_per_group, at = tile * blocks + first * in.blocks_per_group;
  const int64_t x = (tile * row_words + word) * kPlaces * TILE;
  const Streams<STREAMS> words{w.words + (row_block * row_words + word) * QWENRT_BLOCK,
                               stride * row_words * QWENRT_BLOCK, once};
  Cursor<STREAMS> c{words, in.low + x, in.high - in.low, in.scales + at * TILE, in.wide + at};
  GroupScales group(w, row_block * w.groups + first, stride * w.groups);
  const float* x_sums = in.sums + (tile * w.groups + first) * TILE;
  const int64_t parts = in.blocks_per_group;
  for (int64_t rest = last - first; rest > 0; --rest, x_sums += TILE) {
    Sums<STREAMS, TILE> sums;
    UNROLL(STREAMS, s, { UNROLL(TILE, t, { sums.set(s, t, _mm256_setzero_ps()); }); });
    if constexpr (WHOLE) {
      for (int64_t part = parts; part > 0; --part) add_block<BITS, TILE>(c, MOST, sums);
    } else {
      for (int64_t count = w.words_per_group; count > 0; count -= MOST)
        add_block<BITS, TILE>(c, count < MOST ? count : MOST, sums);
    }
    UNROLL(STREAMS, s, {
      const __m256 scale = group.scales(s);
      const __m256 zero = group.zeros(s);
      UNROLL(TILE, t, {
        float* total = totals + (s * TILE + t) * QWENRT_BLOCK;
        const __m256 sum = _mm256_fnmadd_ps(zero, _mm256_broadcast_ss(x_sums + t), sums.at(s, t));
        _mm256_store_ps(total, _mm256_fmadd_ps(scale, sum, _mm256_load_ps(total)));
      });
    });
    group.advance();
  }
}

template <int TILE, int STREAMS>
INLINE void store_tile(const QwenrtQuantMatrix& w, const IntegerInput& in, const float* totals, float* y,
                       int64_t row_block, int64_t stride, int64_t tile) {
  UNROLL(STREAMS, s, {
    const int64_t block = row_block + s * stride;
    UNROLL(TILE, t, {
      if (tile * TILE + t < in.tokens)
        store_rows(w, y + (tile * TILE + t) * w.out_features, _mm256_load_ps(totals + (s * TILE + t) * QWENRT_BLOCK),
                   &block);
    });
  });
}

// Few tokens: the weights are read once, from STREAMS distant places, and again from the cache for the next tile.
template <int BITS, int TILE, int STREAMS, bool WHOLE, bool ONCE = false>
void distant_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / STREAMS;
  for (int64_t b = begin; b < begin + stride; ++b)
    for (int64_t tile = 0; tile < in.tiles; ++tile) {
      alignas(32) float totals[STREAMS * TILE * QWENRT_BLOCK] = {};
      add_groups<BITS, TILE, STREAMS, WHOLE>(w, in, totals, b, stride, tile, 0, w.groups, ONCE);
      store_tile<TILE, STREAMS>(w, in, totals, y, b, stride, tile);
    }
  for (int64_t b = begin + stride * STREAMS; b < end; ++b)
    for (int64_t tile = 0; tile < in.tiles; ++tile) {
      alignas(32) float totals[TILE * QWENRT_BLOCK] = {};
      add_groups<BITS, TILE, 1, WHOLE>(w, in, totals, b, 0, tile, 0, w.groups, ONCE);
      store_tile<TILE, 1>(w, in, totals, y, b, 0, tile);
    }
}

constexpr int64_t kFewTiles = 4;     // whose activations stay in the first cache beside a row's words
constexpr int64_t kSlabWords = 128;  // of a row: the words of 16 rows stay in the first cache while all tokens pass

// Many tokens: STREAMS neighbouring row blocks times all tiles, slab by slab of the inputs.
template <int BITS, int STREAMS, bool WHOLE>
void neighbouring_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t row_block) {
  constexpr int TILE = 4, FLOATS = STREAMS * TILE * QWENRT_BLOCK;
  alignas(32) float totals[kIntegerTokens / TILE * FLOATS];
  for (int64_t i = 0; i < in.tiles * FLOATS; ++i) totals[i] = 0;
  const int64_t slab = w.words_per_group < kSlabWords ? kSlabWords / w.words_per_group : 1;
  for (int64_t first = 0; first < w.groups; first += slab) {
    const int64_t last = first + slab < w.groups ? first + slab : w.groups;
    for (int64_t tile = 0; tile < in.tiles; ++tile)
      add_groups<BITS, TILE, STREAMS, WHOLE>(w, in, totals + tile * FLOATS, row_block, 1, tile, first, last, false);
  }
  for (int64_t tile = 0; tile < in.tiles; ++tile)
    store_tile<TILE, STREAMS>(w, in, totals + tile * FLOATS, y, row_block, 1, tile);
}

template <int BITS, bool WHOLE>
void rows_of(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  if (in.tile == 1 && hint_once()) return distant_rows<BITS, 1, 2, WHOLE, true>(w, in, y, begin, end);
  if (in.tile == 1) return distant_rows<BITS, 1, 2, WHOLE>(w, in, y, begin, end);
  if (in.tile == 2) return distant_rows<BITS, 2, 2, WHOLE>(w, in, y, begin, end);
  if (in.tiles <= kFewTiles) return distant_rows<BITS, 4, 2, WHOLE>(w, in, y, begin, end);
  for (; begin + 2 <= end; begin += 2) neighbouring_rows<BITS, 2, WHOLE>(w, in, y, begin);
  if (begin < end) neighbouring_rows<BITS, 1, WHOLE>(w, in, y, begin);
}

INLINE __m128i fold(__m256i v, __m128i (*join)(__m128i, __m128i)) {
  __m128i four = join(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = join(four, _mm_shuffle_epi32(four, 0x4e));
  return join(four, _mm_shuffle_epi32(four, 0xb1));
}

// 32 activations as bytes, in the order of places of four words of 8 inputs.
INLINE __m256i in_places(const __m256i (&q)[4]) {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i bytes = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 2, 4, 6,
                                                     1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

void place_byte_block(const int32_t* rounded, bool wide, int32_t* low, int32_t* high) {
  __m256i lower[4], upper[4];
  UNROLL(4, i, {
    lower[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded) + i);
    upper[i] = _mm256_srai_epi32(_mm256_add_epi32(lower[i], _mm256_set1_epi32(128)), 8);
    if (wide) lower[i] = _mm256_sub_epi32(lower[i], _mm256_slli_epi32(upper[i], 8));
  });
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), in_places(lower));
  if (wide) _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), in_places(upper));
}

}  // namespace

void avx2_integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  const bool whole = w.words_per_group % ((w.bits == 4 ? kByteBlock : kPairBlock) * w.bits / 32) == 0;
  if (w.bits == 8) return whole ? rows_of<8, true>(w, in, y, begin, end) : rows_of<8, false>(w, in, y, begin, end);
  return whole ? rows_of<4, true>(w, in, y, begin, end) : rows_of<4, false>(w, in, y, begin, end);
}

BlockKind avx2_round_block(const float* x, int64_t n, int bits, NarrowRule narrow, RoundedBlock& out) {
  // The bits of |x| are in the order of |x|, with infinity and then NaN above all numbers.
  __m256i most = _mm256_setzero_si256();
  __m256 totals = _mm256_setzero_ps();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i bits_of = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)), magnitude);
    most = _mm256_max_epi32(most, bits_of);
    totals = _mm256_add_ps(totals, _mm256_castsi256_ps(bits_of));
  }
  const float largest =
      _mm_cvtss_f32(_mm_castsi128_ps(fold(most, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); })));
  if (!(largest <= kLargestActivation)) return BlockKind::kNotFinite;
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(totals), _mm256_extractf128_ps(totals, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  const float total = _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  const BlockScale block = scale_of(largest, total, n, narrow);
  out.scale = block.scale;
  const __m256 inverse = _mm256_set1_ps(block.inverse);
  alignas(32) int32_t q[kPairBlock];
  __m256i all = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
    _mm256_store_si256(reinterpret_cast<__m256i*>(q + i), rounded);
    all = _mm256_add_epi32(all, rounded);
  }
  out.sum = _mm_cvtsi128_si32(fold(all, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); }));
  if (bits == 8) place_pairs(q, n, out.low);
  else if (n == kByteBlock) place_byte_block(q, block.wide, out.low, out.high);
  else if (block.wide) place_wide(q, n, bits, out.low, out.high);
  else place_bytes(q, n, bits, out.low);
  return bits == 8 || !block.wide ? BlockKind::kNarrow : BlockKind::kWide;
}
#endif
