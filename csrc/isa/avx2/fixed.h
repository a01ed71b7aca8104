// 16-bit weights and activations in fixed point: what many tokens are multiplied in where rounding is allowed. A
// product of two int16 with its neighbour is one instruction, as eight in float32 are, and adds up sixteen.
//
// 14 bits each, as float16 has 11: a row's weights of a slab share a scale, and a token's activations of kFixedBlock
// inputs, whose products then fit in int32. Internal linkage: included by panels.cpp alone.
#pragma once
#include "isa/avx2/vectors.h"

namespace {

constexpr int64_t kPanel = 16;                  // rows of one panel: two vectors
constexpr int64_t kSlabPairs = kDenseSlab / 2;  // of inputs
constexpr int64_t kBlockPairs = kFixedBlock / 2;

// A slab of a panel in fixed point.
struct FixedPanel {
  alignas(64) int32_t pairs[kSlabPairs * kPanel];  // [pair][row]: two weights each
  alignas(32) float scales[kPanel];
};

template <int TILE>
struct Tile {
  static constexpr int value = TILE;
};

// f(tile, tokens before it) for every tile of the next `some` of `tokens`.
template <class Each>
INLINE void each_tile(int64_t tokens, int64_t some, Each f) {
  for (int64_t done = 0; done < some;) {
    const int64_t tile = next_tile(tokens - done);
    switch (tile) {
      case 6: f(Tile<6>(), done); break;
      case 5: f(Tile<5>(), done); break;
      case 4: f(Tile<4>(), done); break;
      case 3: f(Tile<3>(), done); break;
      case 2: f(Tile<2>(), done); break;
      default: f(Tile<1>(), done);
    }
    done += tile;
  }
}

INLINE __m256i size_of(__m256i words) { return _mm256_and_si256(words, _mm256_set1_epi16(0x7fff)); }

// Bits of the largest of `count` weights of a row, a multiple of 16; 16-bit floats are in the order of their bits.
inline uint16_t largest_bits(const uint16_t* row, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  for (int64_t k = 0; k < count; k += 16) most = _mm256_max_epi16(most, size_of(load256(row + k)));
  const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));  // there is no _mm_maxpos
  return uint16_t(~_mm_cvtsi128_si32(least));
}

// Whether a quarter of the weights, zeros aside, are below `bits`.
inline bool many_below(const uint16_t* row, int64_t count, uint16_t bits) {
  __m256i small = _mm256_setzero_si256();
  const __m256i zero = _mm256_setzero_si256(), limit = _mm256_set1_epi16(int16_t(bits));
  for (int64_t k = 0; k < count; k += 16) {
    const __m256i size = size_of(load256(row + k));
    small = _mm256_sub_epi16(small, _mm256_and_si256(_mm256_cmpgt_epi16(limit, size), _mm256_cmpgt_epi16(size, zero)));
  }
  const __m256i twos = _mm256_madd_epi16(small, _mm256_set1_epi16(1));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(twos), _mm256_extracti128_si256(twos, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return int64_t(_mm_cvtsi128_si32(four)) * 4 >= count;
}

// The largest of a row's weights of a slab, or a negative number where 14 bits would make too little of them.
template <bool HALF>
inline float fixed_largest(const uint16_t* row, int64_t count) {
  const uint16_t bits = largest_bits(row, count);
  const float largest = value16<HALF>(&bits);
  if (largest == 0) return 0;
  if (!(largest >= kSmallestActivation && largest <= kLargestFixed)) return -1;
  static_assert(kFixedFar == 1 << 7, "so many times smaller is an exponent smaller by seven");
  const int exponent = HALF ? 7 << 10 : 7 << 7;
  return bits > exponent && many_below(row, count, uint16_t(bits - exponent)) ? -1.0f : largest;
}

// 16 weights as int16, in order.
template <bool HALF>
INLINE __m256i fix16(const uint16_t* p, __m256 inverse) {
  const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load16<HALF>(p), inverse));
  const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load16<HALF>(p + 8), inverse));
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
}

// 8 rows x 8 pairs to [8 pairs][kPanel].
INLINE void transpose8(const __m256i (&rows)[8], int32_t* out) {
  __m256i twos[8], fours[8];
  UNROLL(4, i, {
    twos[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    twos[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  UNROLL(2, i, {
    UNROLL(2, j, {
      fours[4 * i + 2 * j] = _mm256_unpacklo_epi64(twos[4 * i + j], twos[4 * i + 2 + j]);
      fours[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(twos[4 * i + j], twos[4 * i + 2 + j]);
    });
  });
  UNROLL(4, j, {
    const __m256i low = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
    const __m256i high = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + j * kPanel), low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + (4 + j) * kPanel), high);
  });
}

// Inputs [0, count) of 16 rows, a multiple of kFixedBlock, in fixed point; false where they do not bear it.
template <bool HALF>
bool fix_panel(const uint16_t* const* rows, int64_t count, FixedPanel& panel) {
  __m256 inverses[kPanel];
  for (int64_t r = 0; r < kPanel; ++r) {
    const float largest = fixed_largest<HALF>(rows[r], count);
    if (largest < 0) return false;
    panel.scales[r] = largest / kFixedLimit;
    inverses[r] = _mm256_set1_ps(largest > 0 ? kFixedLimit / largest : 0.0f);
  }
  for (int64_t first = 0; first < kPanel; first += 8)
    for (int64_t k = 0; k < count; k += 16) {
      __m256i eight[8];
      UNROLL(8, r, { eight[r] = fix16<HALF>(rows[first + r] + k, inverses[first + r]); });
      transpose8(eight, panel.pairs + k / 2 * kPanel + first);
    }
  return true;
}

INLINE void add_pairs(__m256i& sum, __m256i weights, __m256i x) {
  __m256i product;
  asm("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(weights), "x"(x));
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
}

// Sums of TILE tokens with COUNT pairs of a panel's rows, as panel_times_tile of floats.
template <int TILE, int COUNT>
INLINE void add_pairs_of(const int32_t* panel, const int32_t* x, __m256i (&low)[TILE], __m256i (&high)[TILE]) {
  UNROLL(COUNT, k, {
    const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + k * kPanel));
    const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + k * kPanel + 8));
    UNROLL(TILE, t, {
      __m256i value;
      asm("vpbroadcastd %1, %0" : "=x"(value) : "m"(x[k * TILE + t]));
      add_pairs(low[t], first, value);
      add_pairs(high[t], second, value);
    });
  });
}

// Added to sums [TILE][kPanel]. x [pair][TILE], scales [block][TILE].
template <int TILE>
void fixed_times_tile(const FixedPanel& panel, const int32_t* x, const float* scales, float* sums, int64_t blocks) {
  alignas(32) float totals[TILE * kPanel] = {};
  const int32_t* pairs = panel.pairs;
  for (; blocks > 0; --blocks, scales += TILE) {
    constexpr int AT_ONCE = 8;
    __m256i low[TILE], high[TILE];
    UNROLL(TILE, t, { low[t] = high[t] = _mm256_setzero_si256(); });
    for (int64_t k = 0; k < kBlockPairs; k += AT_ONCE, pairs += AT_ONCE * kPanel, x += AT_ONCE * TILE)
      add_pairs_of<TILE, AT_ONCE>(pairs, x, low, high);
    UNROLL(TILE, t, {
      float* to = totals + t * kPanel;
      const __m256 scale = _mm256_broadcast_ss(scales + t);
      _mm256_store_ps(to, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(low[t]), _mm256_load_ps(to)));
      _mm256_store_ps(to + 8, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(high[t]), _mm256_load_ps(to + 8)));
    });
  }
  UNROLL(2 * TILE, i, {
    const __m256 scale = _mm256_load_ps(panel.scales + i % 2 * 8);
    float* to = sums + i * 8;
    _mm256_store_ps(to, _mm256_fmadd_ps(scale, _mm256_load_ps(totals + i * 8), _mm256_load_ps(to)));
  });
}

// The next `some` of `tokens`, whose x and scales of a slab these are, in tiles.
inline void fixed_times_tokens(const FixedPanel& panel, const int32_t* x, const float* scales, float* sums,
                               int64_t tokens, int64_t some, int64_t blocks) {
  each_tile(tokens, some, [&](auto tile, int64_t done) {
    constexpr int TILE = decltype(tile)::value;
    fixed_times_tile<TILE>(panel, x + done * blocks * kBlockPairs, scales + done * blocks, sums + done * kPanel,
                           blocks);
  });
}

}  // namespace
