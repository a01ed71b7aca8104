// AVX2 kernels of the linears with 16-bit weights, multiplied in float32.
//
// Few tokens are bound by the reading of W: dot products along the inputs, several distant rows at once. Many are bound
// by the multiply-adds: a panel of rows is converted once and stays in the first cache while all tokens pass over it.
// Which of the two depends on the number of tokens alone, and a row's sums are added up in the same order wherever in
// a task or a panel it is: results do not depend on how the rows are shared.
#include "kernels_avx2.h"

#ifdef QWENRT_X86

namespace {

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

constexpr int64_t kPanel = 16;  // rows of one panel: two vectors
constexpr int64_t kSlab = 1024;  // inputs of a panel that are converted at once: 64 KiB of floats
constexpr int64_t kChain = 256;  // inputs that are added up one after another: longer chains round more

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
    for (int64_t r = 0; r < kPanel; ++r) panel[k * kPanel + r] = value16<HALF>(rows[r] + k);
}

// What a slab adds to y: to the bias, if any, at first.
struct Slab {
  const float* bias;
  int64_t in_features, out_features;
  int64_t inputs;
  int64_t rows;  // of the panel that there are
  bool first;
};

// The sums of one token and a panel to its y.
inline void add_to(float* y, const float* sums, const Slab& slab) {
  const float* to = slab.first ? slab.bias : y;
  if (slab.rows < kPanel) {
    for (int64_t r = 0; r < slab.rows; ++r) y[r] = to ? to[r] + sums[r] : sums[r];
    return;
  }
  for (int64_t r = 0; r < kPanel; r += 8) {
    const __m256 sum = _mm256_load_ps(sums + r);
    _mm256_storeu_ps(y + r, to ? _mm256_add_ps(_mm256_loadu_ps(to + r), sum) : sum);
  }
}

// TILE tokens times a panel: each input costs two loads, TILE broadcasts and 2 * TILE multiply-adds.
template <int TILE>
void panel_times_tile(const float* panel, const float* x, float* y, const Slab& slab) {
  alignas(32) float sums[TILE][kPanel] = {};
  const int64_t between = slab.in_features;
  for (int64_t done = 0; done < slab.inputs; done += kChain, x += kChain) {
    const int64_t count = slab.inputs - done < kChain ? slab.inputs - done : kChain;
    __m256 low[TILE], high[TILE];
    UNROLL(TILE, t, { low[t] = high[t] = _mm256_setzero_ps(); });
    for (int64_t k = 0; k < count; ++k, panel += kPanel) {
      const __m256 first = _mm256_load_ps(panel), second = _mm256_load_ps(panel + 8);
      UNROLL(TILE, t, {
        const __m256 value = _mm256_broadcast_ss(x + t * between + k);
        low[t] = _mm256_fmadd_ps(first, value, low[t]);
        high[t] = _mm256_fmadd_ps(second, value, high[t]);
      });
    }
    UNROLL(TILE, t, {
      _mm256_store_ps(sums[t], _mm256_add_ps(_mm256_load_ps(sums[t]), low[t]));
      _mm256_store_ps(sums[t] + 8, _mm256_add_ps(_mm256_load_ps(sums[t] + 8), high[t]));
    });
  }
  for (int64_t t = 0; t < TILE; ++t) add_to(y + t * slab.out_features, sums[t], slab);
}

// All tokens in tiles of 6 at most and as equal as can be: small ones leave multiply-adds waiting for each other.
void panel_times_tokens(const float* panel, const float* x, float* y, int64_t tokens, const Slab& slab) {
  for (int64_t tiles = (tokens + 5) / 6; tiles > 0; --tiles) {
    const int64_t tile = (tokens + tiles - 1) / tiles;
    if (tile == 6) panel_times_tile<6>(panel, x, y, slab);
    else if (tile == 5) panel_times_tile<5>(panel, x, y, slab);
    else if (tile == 4) panel_times_tile<4>(panel, x, y, slab);
    else if (tile == 3) panel_times_tile<3>(panel, x, y, slab);
    else if (tile == 2) panel_times_tile<2>(panel, x, y, slab);
    else panel_times_tile<1>(panel, x, y, slab);
    x += tile * slab.in_features;
    y += tile * slab.out_features;
    tokens -= tile;
  }
}

template <bool HALF>
void panel_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens, int64_t out_features,
                int64_t in_features, int64_t begin, int64_t end) {
  alignas(64) float panel[kSlab * kPanel];
  for (int64_t n = begin; n < end; n += kPanel) {
    Slab slab{bias ? bias + n : nullptr, in_features, out_features, 0, end - n < kPanel ? end - n : kPanel, true};
    for (int64_t k = 0; slab.first || k < in_features; k += kSlab, slab.first = false) {
      const uint16_t* rows[kPanel];
      for (int64_t r = 0; r < kPanel; ++r)  // the last one stands in for those that there are not
        rows[r] = w + (n + (r < slab.rows ? r : slab.rows - 1)) * in_features + k;
      slab.inputs = in_features - k < kSlab ? in_features - k : kSlab;
      convert_panel<HALF>(rows, slab.inputs, panel);
      panel_times_tokens(panel, x + k, y + n, tokens, slab);
    }
  }
}

constexpr int64_t kPanelTokens = 16;  // from so many on, converting a panel pays

}  // namespace

void avx2_dense16_rows(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                       int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end) {
  const auto few = is_half ? dense_rows<true> : dense_rows<false>;
  const auto many = is_half ? panel_rows<true> : panel_rows<false>;
  return (tokens < kPanelTokens ? few : many)(w, bias, x, y, tokens, out_features, in_features, begin, end);
}
#endif
