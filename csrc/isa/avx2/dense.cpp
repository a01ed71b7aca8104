// AVX2 kernels of the linears with 16-bit weights, multiplied in float32.
//
// Few tokens are bound by the reading of W: dot products along the inputs, several distant rows at once. Many are bound
// by the multiply-adds: a panel of rows is converted once and stays in the first cache while all tokens pass over it.
// Which of the two depends on the number of tokens alone, and a row's sums are added up in the same order wherever in
// a task or a panel it is: results do not depend on how the rows are shared.
#include "isa/avx2/vectors.h"
#include "isa/avx2/fixed.h"

#ifdef QWENRT_X86

namespace {

// 16 values as two vectors. Unpacking works within halves of a register, hence the permutation.
template <bool HALF>
INLINE void load_two(const uint16_t* p, __m256* values) {
  if constexpr (HALF) {
    values[0] = load16<true>(p);
    values[1] = load16<true>(p + 8);
  } else {
    const __m256i raw = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0xd8);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), raw));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), raw));
  }
}

// STREAMS rows, `stride` apart, times TILE tokens: vectors run along the inputs.
template <bool HALF, int TILE, int STREAMS>
void dense_rows_times_tile(const uint16_t* w, const float* bias, const float* x, float* y, int64_t out_features,
                           int64_t in_features, int64_t first, int64_t stride) {
  constexpr int CHAINS = TILE == 1 ? 2 : 1;
  __m256 acc[CHAINS][STREAMS][TILE];
  UNROLL(CHAINS, c, { UNROLL(STREAMS, s, { UNROLL(TILE, t, { acc[c][s][t] = _mm256_setzero_ps(); }); }); });
  const uint16_t* rows[STREAMS];
  UNROLL(STREAMS, s, { rows[s] = w + (first + s * stride) * in_features; });
  int64_t k = 0;
  for (; k + 16 <= in_features; k += 16)
    UNROLL(STREAMS, s, {
      __m256 values[2];
      load_two<HALF>(rows[s] + k, values);
      UNROLL(2, c, {
        UNROLL(TILE, t, {
          const __m256 xs = _mm256_loadu_ps(x + t * in_features + k + 8 * c);
          acc[c % CHAINS][s][t] = _mm256_fmadd_ps(values[c], xs, acc[c % CHAINS][s][t]);
        });
      });
    });
  UNROLL(STREAMS, s, {
    const int64_t n = first + s * stride;
    UNROLL(TILE, t, {
      __m256 all = acc[0][s][t];
      for (int c = 1; c < CHAINS; ++c) all = _mm256_add_ps(all, acc[c][s][t]);
      float sum = sum8(all);
      for (int64_t i = k; i < in_features; ++i) sum += value_of<HALF>(rows[s][i]) * x[t * in_features + i];
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
constexpr int64_t kMostTokens = 4;  // of one tile

template <bool HALF>
void dense_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens, int64_t out_features,
                int64_t in_features, int64_t begin, int64_t end) {
  int64_t step = end - begin;
  if (tokens > kMostTokens) step = kRowsInCache / (in_features + 1) > 12 ? kRowsInCache / (in_features + 1) : 12;
  for (; begin < end; begin += step) {
    const int64_t last = begin + step < end ? begin + step : end;
    int64_t tiles = (tokens + kMostTokens - 1) / kMostTokens;
    for (int64_t t = 0; t < tokens; --tiles) {
      const int64_t tile = (tokens - t + tiles - 1) / tiles;
      const auto run = tile == 1   ? dense_tile<HALF, 1, 4>
                       : tile == 2 ? dense_tile<HALF, 2, 4>
                       : tile == 3 ? dense_tile<HALF, 3, 4>
                                   : dense_tile<HALF, 4, 3>;
      run(w, bias, x + t * in_features, y + t * out_features, out_features, in_features, begin, last);
      t += tile;
    }
  }
}

constexpr int64_t kPanelTokens = 16;    // from so many on, converting a panel pays
constexpr int64_t kSumsInCache = 512;   // tokens whose sums with a panel are held while its slabs pass

// 16 rows x 8 inputs of W to panel [8][16]. Unpacking works within halves of a register: they are loaded with the rows
// that come out in order.
template <bool HALF>
INLINE void convert_block(const uint16_t* const* rows, int64_t k, float* panel) {
  __m256i in[8], pairs[8], fours[8];
  UNROLL(8, i, {
    constexpr int row = HALF ? i : i + (i & 4), apart = HALF ? 8 : 4;
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + k));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row + apart] + k));
    in[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  });
  UNROLL(4, i, {
    pairs[i] = _mm256_unpacklo_epi16(in[2 * i], in[2 * i + 1]);
    pairs[4 + i] = _mm256_unpackhi_epi16(in[2 * i], in[2 * i + 1]);
  });
  UNROLL(4, i, {
    constexpr int from = (i / 2) * 4 + (i % 2) * 2;
    fours[2 * i] = _mm256_unpacklo_epi32(pairs[from], pairs[from + 1]);
    fours[2 * i + 1] = _mm256_unpackhi_epi32(pairs[from], pairs[from + 1]);
  });
  UNROLL(8, j, {
    constexpr int from = (j / 4) * 4 + (j / 2) % 2;
    const __m256i one = j % 2 ? _mm256_unpackhi_epi64(fours[from], fours[from + 2])
                              : _mm256_unpacklo_epi64(fours[from], fours[from + 2]);
    float* out = panel + j * kPanel;
    if constexpr (HALF) {
      _mm256_store_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(one)));
      _mm256_store_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(one, 1)));
    } else {
      const __m256i none = _mm256_setzero_si256();
      _mm256_store_ps(out, _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, one)));
      _mm256_store_ps(out + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, one)));
    }
  });
}

// Inputs [0, count) of 16 rows to panel [count][16].
template <bool HALF>
void convert_panel(const uint16_t* const* rows, int64_t count, float* panel) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) convert_block<HALF>(rows, k, panel + k * kPanel);
  for (; k < count; ++k)
    for (int64_t r = 0; r < kPanel; ++r) panel[k * kPanel + r] = value_of<HALF>(rows[r][k]);
}

// acc += a * b where it is written: left to itself, the compiler moves loads so far ahead that multiply-adds wait.
INLINE void multiply_add(__m256 a, __m256 b, __m256& acc) { asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }

// TILE tokens times inputs [0, COUNT) of a slab of a panel: each costs two loads, TILE broadcasts and 2 * TILE
// multiply-adds.
template <int TILE, int COUNT>
INLINE void add_inputs(const float* panel, const float* x, __m256 (&low)[TILE], __m256 (&high)[TILE]) {
  UNROLL(COUNT, k, {
    const __m256 first = _mm256_load_ps(panel + k * kPanel), second = _mm256_load_ps(panel + k * kPanel + 8);
    UNROLL(TILE, t, {
      const __m256 value = _mm256_broadcast_ss(x + k * TILE + t);
      multiply_add(first, value, low[t]);
      multiply_add(second, value, high[t]);
    });
  });
}

// Added to sums [TILE][16]. A slab is a chain of its own: longer ones round more.
template <int TILE>
void panel_times_tile(const float* panel, const float* x, float* sums, int64_t inputs) {
  constexpr int AT_ONCE = 4;
  __m256 low[TILE], high[TILE];
  UNROLL(TILE, t, { low[t] = high[t] = _mm256_setzero_ps(); });
  for (; inputs >= AT_ONCE; inputs -= AT_ONCE, panel += AT_ONCE * kPanel, x += AT_ONCE * TILE)
    add_inputs<TILE, AT_ONCE>(panel, x, low, high);
  for (; inputs > 0; --inputs, panel += kPanel, x += TILE) add_inputs<TILE, 1>(panel, x, low, high);
  UNROLL(TILE, t, {
    float* to = sums + t * kPanel;
    _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), low[t]));
    _mm256_store_ps(to + 8, _mm256_add_ps(_mm256_load_ps(to + 8), high[t]));
  });
}

// The tokens of as many of the next tiles as have kSumsInCache at most.
int64_t tokens_at_once(int64_t tokens) {
  int64_t some = 0;
  while (some < tokens && some + next_tile(tokens - some) <= kSumsInCache) some += next_tile(tokens - some);
  return some;
}

// x is one slab's inputs of the next `tokens`, in tiles; of them the first `some` count.
void panel_times_tokens(const float* panel, const float* x, float* sums, int64_t tokens, int64_t some, int64_t inputs) {
  each_tile(tokens, some, [&](auto tile, int64_t done) {
    panel_times_tile<decltype(tile)::value>(panel, x + done * inputs, sums + done * kPanel, inputs);
  });
}

// The first `rows` sums of each token to y, with the bias.
void store_panel(const float* sums, const float* bias, float* y, int64_t tokens, int64_t rows, int64_t out_features) {
  for (int64_t t = 0; t < tokens; ++t, sums += kPanel, y += out_features)
    for (int64_t r = 0; r < rows; ++r) y[r] = bias ? sums[r] + bias[r] : sums[r];
}

// A panel of rows and what tokens add to it, slab by slab of the inputs.
struct Panel {
  alignas(64) float floats[kDenseSlab * kPanel];
  alignas(64) float sums[kSumsInCache * kPanel];
  FixedPanel fixed;
};

// Inputs [k, k + inputs) of `rows`, times tokens [from, from + some) of `tokens`: in fixed point, if it is asked for, where
// these weights bear it.
template <bool HALF>
void panel_times_slab(Panel& panel, const uint16_t* const* rows, const float* x, const FixedInput& fixed, int64_t tokens,
                      int64_t from, int64_t some, int64_t k, int64_t inputs) {
  const int64_t blocks = inputs / kFixedBlock, pair = k / 2 * tokens + from * inputs / 2;
  if (fixed.pairs && !fixed.uneven[k / kDenseSlab] && fix_panel<HALF>(rows, inputs, panel.fixed)) {
    const float* const scales = fixed.scales + (k * tokens + from * inputs) / kFixedBlock;
    return fixed_times_tokens(panel.fixed, fixed.pairs + pair, scales, panel.sums, tokens - from, some, blocks);
  }
  convert_panel<HALF>(rows, inputs, panel.floats);
  panel_times_tokens(panel.floats, x + k * tokens + from * inputs, panel.sums, tokens - from, some, inputs);
}

// x [slab][tile][input][token of tile], as isa/linear_kernels.h says.
template <bool HALF>
void panel_rows(const uint16_t* w, const float* bias, const float* x, const FixedInput& fixed, float* y, int64_t tokens,
                int64_t out_features, int64_t in_features, int64_t begin, int64_t end) {
  Panel panel;
  for (int64_t from = 0, some = 0; from < tokens; from += some) {
    some = tokens_at_once(tokens - from);
    for (int64_t n = begin; n < end; n += kPanel) {
      const int64_t there = end - n < kPanel ? end - n : kPanel;
      for (int64_t i = 0; i < some * kPanel; ++i) panel.sums[i] = 0;
      for (int64_t k = 0; k < in_features; k += kDenseSlab) {
        const uint16_t* rows[kPanel];
        for (int64_t r = 0; r < kPanel; ++r)  // the last one stands in for those that there are not
          rows[r] = w + (n + (r < there ? r : there - 1)) * in_features + k;
        const int64_t inputs = in_features - k < kDenseSlab ? in_features - k : kDenseSlab;
        panel_times_slab<HALF>(panel, rows, x, fixed, tokens, from, some, k, inputs);
      }
      store_panel(panel.sums, bias ? bias + n : nullptr, y + from * out_features + n, some, there, out_features);
    }
  }
}

}  // namespace

void avx2_dense16_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                       int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end) {
  if (tokens >= kPanelTokens)
    return avx2_fixed_rows(w, bias, x, {}, y, tokens, out_features, in_features, is_half, begin, end);
  const auto few = is_half ? dense_rows<true> : dense_rows<false>;
  few(w, bias, x, y, tokens, out_features, in_features, begin, end);
}

void avx2_fixed_rows(const uint16_t* w, const float* bias, const float* x, const FixedInput& fixed, float* y,
                     int64_t tokens, int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end) {
  const auto many = is_half ? panel_rows<true> : panel_rows<false>;
  many(w, bias, x, fixed, y, tokens, out_features, in_features, begin, end);
}

const int64_t avx2_dense_tiles_from = kPanelTokens;
#endif
