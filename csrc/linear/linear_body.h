// Linears in float32, written once over what the including file has defined: Floats and Words, a vector of which is one
// float or one word of each row of kBlocks row blocks, or kWidth = kBlocks * 8 neighbouring inputs; kMostChains, sums
// that a row is added up in beside one token; kVectors16, vectors of 16-bit values that are best loaded together; and
// kDenseRows<TILE>, rows of a dense matrix beside TILE tokens, whose sums fit into the registers.
//
// A quantised word is never unpacked: code j is masked where it lies, converted to float as code * 2^(bits * j), and
// multiplied by an activation that already carries 2^(-bits * j). A thread reads several distant row blocks at once,
// because one sequential stream per core does not fill the memory bus. How many sums a row is added up in depends on
// the tile alone: a row's result is the same wherever it is computed.
#pragma once
#include "isa/linear_kernels.h"
#include "isa/unroll.h"

namespace {

constexpr int kWidth = kBlocks * QWENRT_BLOCK;

// The row blocks of STREAMS vectors.
template <int STREAMS>
struct Blocks {
  int64_t at[STREAMS][kBlocks];
};

template <int BITS, int TILE, int STREAMS>
void blocks_times_tile(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, const Blocks<STREAMS>& blocks,
                       int64_t tile) {
  constexpr int PER_WORD = 32 / BITS, CHAINS = kMostChains / TILE > 0 ? kMostChains / TILE : 1;
  const int64_t row_words = w.groups * w.words_per_group;
  const float* x = in.x + tile * in.padded * TILE;
  const float* sums = in.sums + tile * w.groups * TILE;
  const uint32_t* words[STREAMS][kBlocks];
  int64_t group_at[STREAMS][kBlocks];  // of the scales and zeros
  for (int s = 0; s < STREAMS; ++s)
    for (int b = 0; b < kBlocks; ++b) {
      words[s][b] = w.words + blocks.at[s][b] * row_words * QWENRT_BLOCK;
      group_at[s][b] = blocks.at[s][b] * w.groups * QWENRT_BLOCK;
    }
  Floats total[STREAMS][TILE];
  UNROLL(STREAMS, s, { UNROLL(TILE, t, { total[s][t] = all(0); }); });

  int64_t offset = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    Floats acc[CHAINS][STREAMS][TILE];
    UNROLL(CHAINS, c, { UNROLL(STREAMS, s, { UNROLL(TILE, t, { acc[c][s][t] = all(0); }); }); });
    for (int64_t i = 0; i < w.words_per_group; ++i, offset += QWENRT_BLOCK, x += PER_WORD * TILE) {
      Words word[STREAMS];
      UNROLL(STREAMS, s, { word[s] = load_words(words[s], offset); });
      UNROLL(PER_WORD, j, {
        Floats xs[TILE];
        UNROLL(TILE, t, { xs[t] = all(x[j * TILE + t]); });
        UNROLL(STREAMS, s, {
          const Floats code = code_at<BITS, j>(word[s]);
          UNROLL(TILE, t, { acc[j % CHAINS][s][t] = multiply_add(code, xs[t], acc[j % CHAINS][s][t]); });
        });
      });
    }
    UNROLL(STREAMS, s, {
      const Floats scale = load_scales(w, group_at[s]), zero = load_zeros(w, group_at[s]);
      for (int b = 0; b < kBlocks; ++b) group_at[s][b] += QWENRT_BLOCK;
      UNROLL(TILE, t, {
        Floats sum = acc[0][s][t];
        UNROLL(CHAINS - 1, c, { sum = add(sum, acc[c + 1][s][t]); });
        sum = subtract_product(sum, zero, all(sums[g * TILE + t]));
        total[s][t] = multiply_add(scale, sum, total[s][t]);
      });
    });
  }
  UNROLL(STREAMS, s, {
    UNROLL(TILE, t, {
      if (tile * TILE + t < in.tokens) store_rows(w, y + (tile * TILE + t) * w.out_features, total[s][t], blocks.at[s]);
    });
  });
}

template <int BITS, int TILE, int STREAMS>
void quant_rows_of(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / (STREAMS * kBlocks);
  for (int64_t first = begin; first < begin + stride; ++first) {
    Blocks<STREAMS> blocks;
    for (int i = 0; i < STREAMS * kBlocks; ++i) blocks.at[i / kBlocks][i % kBlocks] = first + i * stride;
    for (int64_t tile = 0; tile < in.tiles; ++tile) blocks_times_tile<BITS, TILE, STREAMS>(w, in, y, blocks, tile);
  }
  for (int64_t first = begin + stride * STREAMS * kBlocks; first < end; first += kBlocks) {
    Blocks<1> blocks;
    for (int i = 0; i < kBlocks; ++i) blocks.at[0][i] = first + i < end ? first + i : end - 1;  // the last one twice
    for (int64_t tile = 0; tile < in.tiles; ++tile) blocks_times_tile<BITS, TILE, 1>(w, in, y, blocks, tile);
  }
}

template <int BITS>
void quant_rows_by_tile(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  if (in.tile == 1) return quant_rows_of<BITS, 1, 4 / kBlocks>(w, in, y, begin, end);
  if (in.tile == 2) return quant_rows_of<BITS, 2, 4 / kBlocks>(w, in, y, begin, end);
  return quant_rows_of<BITS, 4, 2>(w, in, y, begin, end);
}

void quant_rows(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  if (w.bits == 4) return quant_rows_by_tile<4>(w, in, y, begin, end);
  return quant_rows_by_tile<8>(w, in, y, begin, end);
}

// STREAMS rows, `stride` from each other, times TILE tokens from `token` on: vectors run along the inputs.
template <bool HALF, int TILE, int STREAMS>
void dense_rows_times_tile(const DenseProduct& m, int64_t token, int64_t first, int64_t stride) {
  constexpr int CHAINS = TILE == 1 ? 2 : 1, VECTORS = CHAINS > kVectors16 ? CHAINS : kVectors16,
                STEP = kWidth * VECTORS;
  const int64_t in_features = m.in_features, out_features = m.out_features;
  const float *const x = m.x + token * in_features, *const bias = m.bias;
  float* const y = m.y + token * out_features;
  Floats acc[CHAINS][STREAMS][TILE];
  UNROLL(CHAINS, c, { UNROLL(STREAMS, s, { UNROLL(TILE, t, { acc[c][s][t] = all(0); }); }); });
  const uint16_t* rows[STREAMS];
  UNROLL(STREAMS, s, { rows[s] = m.w + (first + s * stride) * in_features; });
  int64_t k = 0;
  for (; k + STEP <= in_features; k += STEP)
    UNROLL(STREAMS, s, {
      Floats values[VECTORS];
      load16<HALF>(rows[s] + k, values);
      UNROLL(VECTORS, v, {
        UNROLL(TILE, t, {
          const Floats xs = load(x + t * in_features + k + kWidth * v);
          acc[v % CHAINS][s][t] = multiply_add(values[v], xs, acc[v % CHAINS][s][t]);
        });
      });
    });
  UNROLL(STREAMS, s, {
    const int64_t n = first + s * stride;
    UNROLL(TILE, t, {
      Floats together = acc[0][s][t];
      UNROLL(CHAINS - 1, c, { together = add(together, acc[c + 1][s][t]); });
      float total = sum(together);
      for (int64_t i = k; i < in_features; ++i) total += value16<HALF>(rows[s] + i) * x[t * in_features + i];
      y[t * out_features + n] = bias ? total + bias[n] : total;
    });
  });
}

template <bool HALF, int TILE>
void dense_tile(const DenseProduct& m, int64_t token, int64_t begin, int64_t end) {
  constexpr int STREAMS = kDenseRows<TILE>;
  const int64_t stride = (end - begin) / STREAMS;
  for (int64_t n = begin; n < begin + stride; ++n) dense_rows_times_tile<HALF, TILE, STREAMS>(m, token, n, stride);
  for (int64_t n = begin + stride * STREAMS; n < end; ++n) dense_rows_times_tile<HALF, TILE, 1>(m, token, n, 0);
}

constexpr int64_t kRowsInCache = 64 * 1024;  // elements of W that are kept in the cache for the next tile of tokens
constexpr int64_t kFewestRows = 12;          // of them

template <bool HALF>
void dense_rows(const DenseProduct& m, int64_t begin, int64_t end) {
  int64_t step = end - begin;
  if (m.tokens > 4) {
    step = kRowsInCache / (m.in_features + 1);
    if (step < kFewestRows) step = kFewestRows;
  }
  for (; begin < end; begin += step) {
    const int64_t last = begin + step < end ? begin + step : end;
    for (int64_t token = 0, tile; token < m.tokens; token += tile) {
      tile = dense_tile_of(m.tokens - token);
      if (tile == 4) dense_tile<HALF, 4>(m, token, begin, last);
      if (tile == 3) dense_tile<HALF, 3>(m, token, begin, last);
      if (tile == 2) dense_tile<HALF, 2>(m, token, begin, last);
      if (tile == 1) dense_tile<HALF, 1>(m, token, begin, last);
    }
  }
}

void dense16_rows(const DenseProduct& product, int64_t begin, int64_t end) {
  if (product.is_half) return dense_rows<true>(product, begin, end);
  return dense_rows<false>(product, begin, end);
}

}  // namespace
