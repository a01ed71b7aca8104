// Linears whose activations are rounded, written once over vectors of the rows of kBlocks row blocks, as linear_body.h.
// A vector of codes holds four of each row, in bytes, and is multiplied with four activations at once.
#pragma once
#include "linear/integer_places.h"
#include "linear/linear_body.h"

namespace {

// out = the dot products of `count` words with one place's activations after the other.
template <int BITS, int TILE, int STREAMS>
INLINE void dot_products(const uint32_t* const (&words)[STREAMS][kBlocks], int64_t offset, const int32_t* x,
                         int64_t count, Ints (&out)[STREAMS][TILE]) {
  constexpr int PLACES = BITS == 4 ? 2 : 1;
  Products<BITS> sums[STREAMS][TILE];
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { clear(sums[s][t]); }); });
  for (int64_t i = 0; i < count; ++i) {
    Words word[STREAMS];
    UNROLL(STREAMS, s, { word[s] = load_words(words[s], offset + i * QWENRT_BLOCK); });
    UNROLL(PLACES, p, {
      Words codes[STREAMS];
      UNROLL(STREAMS, s, { codes[s] = bytes_at<BITS, p>(word[s]); });
      UNROLL(TILE, t, {
        const Words xs = all_words(x[(i * PLACES + p) * TILE + t]);
        UNROLL(STREAMS, s, { add_products(sums[s][t], codes[s], xs); });
      });
    });
  }
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { out[s][t] = total_of(sums[s][t]); }); });
  if constexpr (BITS == 8 && kSignedCodes) {  // codes were taken as code - 128
    int32_t x_sums[TILE] = {};
    add_byte_sums<TILE>(x, count * TILE, x_sums);
    UNROLL(STREAMS, s, { UNROLL(TILE, t, { out[s][t] = add(out[s][t], all_ints(128 * x_sums[t])); }); });
  }
}

constexpr int64_t kByteWords = kByteBlock * 4 / 32;  // of a whole block of 4-bit codes

// The same of one block: a whole one's words are counted by the compiler, which then writes them out.
template <int BITS, int TILE, int STREAMS>
INLINE void block_products(const uint32_t* const (&words)[STREAMS][kBlocks], int64_t offset, const int32_t* x,
                           int64_t count, Ints (&out)[STREAMS][TILE]) {
  if (BITS == 4 && count == kByteWords) dot_products<BITS>(words, offset, x, kByteWords, out);
  else dot_products<BITS>(words, offset, x, count, out);
}

// Adds groups [first, last) of one tile to `totals`.
template <int BITS, int TILE, int STREAMS>
INLINE void add_groups(const QwenrtQuantMatrix& w, const IntegerInput& in, Floats (&totals)[STREAMS][TILE],
                       const Blocks<STREAMS>& blocks, int64_t tile, int64_t first, int64_t last) {
  constexpr int PLACES = BITS == 4 ? 2 : 1;
  const int64_t row_words = w.groups * w.words_per_group, row_parts = w.groups * in.blocks_per_group;
  const uint32_t* words[STREAMS][kBlocks];
  for (int s = 0; s < STREAMS; ++s)
    for (int b = 0; b < kBlocks; ++b) words[s][b] = w.words + blocks.at[s][b] * row_words * QWENRT_BLOCK;
  for (int64_t g = first; g < last; ++g) {
    Floats sums[STREAMS][TILE];
    UNROLL(STREAMS, s, { UNROLL(TILE, t, { sums[s][t] = all(0.0f); }); });
    for (int64_t part = 0; part < in.blocks_per_group; ++part) {
      const int64_t skipped = part * in.words_per_block, rest = w.words_per_group - skipped;
      const int64_t count = rest < in.words_per_block ? rest : in.words_per_block;
      const int64_t word = g * w.words_per_group + skipped;
      const int64_t at = tile * row_parts + g * in.blocks_per_group + part;
      const int64_t x = (tile * row_words + word) * PLACES * TILE;
      Ints dots[STREAMS][TILE];
      block_products<BITS>(words, word * QWENRT_BLOCK, in.low + x, count, dots);
      if (in.wide[at]) {
        Ints high[STREAMS][TILE];
        block_products<BITS>(words, word * QWENRT_BLOCK, in.high + x, count, high);
        UNROLL(STREAMS, s, { UNROLL(TILE, t, { dots[s][t] = add(dots[s][t], times_256(high[s][t])); }); });
      }
      UNROLL(TILE, t, {
        const Floats scale = all(in.scales[at * TILE + t]);
        UNROLL(STREAMS, s, { sums[s][t] = multiply_add(scale, to_floats(dots[s][t]), sums[s][t]); });
      });
    }
    UNROLL(STREAMS, s, {
      int64_t at[kBlocks];
      for (int b = 0; b < kBlocks; ++b) at[b] = (blocks.at[s][b] * w.groups + g) * QWENRT_BLOCK;
      Floats scale, zero;
      load_scales_and_zeros(w, at, &scale, &zero);
      UNROLL(TILE, t, {
        const Floats x_sum = all(in.sums[(tile * w.groups + g) * TILE + t]);
        totals[s][t] = multiply_add(scale, subtract_product(sums[s][t], zero, x_sum), totals[s][t]);
      });
    });
  }
}

template <int TILE, int STREAMS>
INLINE void store_tile(const QwenrtQuantMatrix& w, const IntegerInput& in, const Floats (&totals)[STREAMS][TILE],
                       float* y, const Blocks<STREAMS>& blocks, int64_t tile) {
  UNROLL(STREAMS, s, {
    UNROLL(TILE, t, {
      if (tile * TILE + t < in.tokens)
        store_rows(w, y + (tile * TILE + t) * w.out_features, totals[s][t], blocks.at[s]);
    });
  });
}

template <int TILE, int STREAMS>
INLINE void clear_totals(Floats (&totals)[STREAMS][TILE]) {
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { totals[s][t] = all(0.0f); }); });
}

// Few tokens: the weights are read once.
template <int BITS, int TILE, int STREAMS>
void one_tile(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, const Blocks<STREAMS>& blocks) {
  Floats totals[STREAMS][TILE];
  clear_totals(totals);
  add_groups<BITS>(w, in, totals, blocks, 0, 0, w.groups);
  store_tile(w, in, totals, y, blocks, 0);
}

constexpr int64_t kSlabWords = 128;  // of a row: the words of its blocks stay in the first cache while all tokens pass

// Many tokens: slab by slab of the inputs.
template <int BITS, int STREAMS>
void all_tiles(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, const Blocks<STREAMS>& blocks) {
  constexpr int TILE = 4;
  Floats totals[kIntegerTokens / TILE][STREAMS][TILE];
  for (int64_t tile = 0; tile < in.tiles; ++tile) clear_totals(totals[tile]);
  const int64_t slab = w.words_per_group < kSlabWords ? kSlabWords / w.words_per_group : 1;
  for (int64_t first = 0; first < w.groups; first += slab) {
    const int64_t last = first + slab < w.groups ? first + slab : w.groups;
    for (int64_t tile = 0; tile < in.tiles; ++tile) add_groups<BITS>(w, in, totals[tile], blocks, tile, first, last);
  }
  for (int64_t tile = 0; tile < in.tiles; ++tile) store_tile(w, in, totals[tile], y, blocks, tile);
}

// One tile reads distant row blocks; many tiles go over neighbouring ones, which stay in the cache.
template <int BITS, int TILE, int STREAMS>
void integer_rows_of(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  constexpr int AT_ONCE = STREAMS * kBlocks;
  const int64_t rounds = (end - begin) / AT_ONCE;
  for (int64_t round = 0; round < rounds; ++round) {
    Blocks<STREAMS> blocks;
    for (int i = 0; i < AT_ONCE; ++i)
      blocks.at[i / kBlocks][i % kBlocks] = begin + (in.tiles == 1 ? round + i * rounds : round * AT_ONCE + i);
    if (in.tiles == 1) one_tile<BITS, TILE>(w, in, y, blocks);
    else if constexpr (TILE == 4) all_tiles<BITS>(w, in, y, blocks);  // fewer tokens are one tile
  }
  for (int64_t first = begin + rounds * AT_ONCE; first < end; first += kBlocks) {
    Blocks<1> blocks;
    for (int i = 0; i < kBlocks; ++i) blocks.at[0][i] = first + i < end ? first + i : end - 1;  // the last one twice
    if (in.tiles == 1) one_tile<BITS, TILE>(w, in, y, blocks);
    else if constexpr (TILE == 4) all_tiles<BITS>(w, in, y, blocks);  // fewer tokens are one tile
  }
}

template <int BITS>
void integer_rows_by_tile(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  if (in.tile == 1) return integer_rows_of<BITS, 1, kStreams1>(w, in, y, begin, end);
  if (in.tile == 2) return integer_rows_of<BITS, 2, kStreams2>(w, in, y, begin, end);
  return integer_rows_of<BITS, 4, kStreams4>(w, in, y, begin, end);
}

void integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  if (w.bits == 4) return integer_rows_by_tile<4>(w, in, y, begin, end);
  return integer_rows_by_tile<8>(w, in, y, begin, end);
}

// As Kernels says of bytes.
BlockKind round_block(const float* x, int64_t n, int bits, NarrowRule narrow, RoundedBlock& out) {
  uint32_t most[8] = {};
  float totals[8] = {};
  for (int64_t i = 0; i < n; i += 8)
    for (int j = 0; j < 8; ++j) {
      uint32_t magnitude;  // the bits of |x| are in the order of |x|, with infinity and then NaN above all numbers
      __builtin_memcpy(&magnitude, x + i + j, sizeof magnitude);
      magnitude &= 0x7fffffff;
      most[j] = magnitude > most[j] ? magnitude : most[j];
      totals[j] += __builtin_fabsf(x[i + j]);
    }
  for (int j = 1; j < 8; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
  float largest;
  __builtin_memcpy(&largest, most, sizeof largest);
  if (!(largest <= kLargestActivation)) return BlockKind::kNotFinite;
  const float total =
      ((totals[0] + totals[4]) + (totals[2] + totals[6])) + ((totals[1] + totals[5]) + (totals[3] + totals[7]));
  const BlockScale block = scale_of(largest, total, n, narrow);
  out.scale = block.scale;
  int32_t q[kPairBlock], all_of_them = 0;
  for (int64_t i = 0; i < n; i += 8) round8(x + i, block.inverse, q + i);
  for (int64_t i = 0; i < n; ++i) all_of_them += q[i];
  out.sum = all_of_them;
  if (block.wide) place_wide(q, n, bits, out.low, out.high);
  else place_bytes(q, n, bits, out.low);
  return block.wide ? BlockKind::kWide : BlockKind::kNarrow;
}

}  // namespace
