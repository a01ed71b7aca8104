// AVX2 kernels of 16-bit weights and many tokens. These are bound by the multiply-adds: a panel of rows is converted
// once and stays in the first cache while all tokens pass over it, in float32 or, where that is asked for, in fixed
// point. A row's sums are added up in the same order wherever in a task or a panel it is.
#include "isa/avx2/vectors.h"

#ifdef QWENRT_X86
#include "isa/avx2/fixed.h"

namespace {

constexpr int64_t kSumsInCache = 512;   // tokens whose sums with a panel are held while its slabs pass

// 16 rows x 8 inputs of W to panel [8][16]. Unpacking works within halves of a register: they are loaded with the rows
// that come out in order.
template <bool HALF>
INLINE void convert_block(const uint16_t* const* rows, int64_t k, float* panel) {
  __m256i in[8], pairs[8], fours[8];
  UNROLL(8, i, {
    constexpr int row = HALF ? i : i + (i & 4), next = HALF ? 8 : 4;
    const __m128i low = load128(rows[row] + k), high = load128(rows[row + next] + k);
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

// acc += a * b where it is written: left to itself, the compiler moves loads so far ahead that multiply-adds wait.
INLINE void add_product(__m256 a, __m256 b, __m256& acc) { asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }

// TILE tokens times inputs [0, COUNT) of a slab of a panel: each costs two loads, TILE broadcasts and 2 * TILE
// multiply-adds.
template <int TILE, int COUNT>
INLINE void add_inputs(const float* panel, const float* x, __m256 (&low)[TILE], __m256 (&high)[TILE]) {
  UNROLL(COUNT, k, {
    const __m256 first = _mm256_load_ps(panel + k * kPanel), second = _mm256_load_ps(panel + k * kPanel + 8);
    UNROLL(TILE, t, {
      const __m256 value = _mm256_broadcast_ss(x + k * TILE + t);
      add_product(first, value, low[t]);
      add_product(second, value, high[t]);
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

// Inputs [k, k + inputs) of `rows`, times tokens [from, from + some): in fixed point, if it is asked for, where these
// weights bear it.
template <bool HALF>
void panel_times_slab(Panel& panel, const uint16_t* const* rows, const DenseProduct& m, const FixedInput& fixed,
                      int64_t from, int64_t some, int64_t k, int64_t inputs) {
  const int64_t blocks = inputs / kFixedBlock, pair = k / 2 * m.tokens + from * inputs / 2;
  if (fixed.pairs && !fixed.in_float32[k / kDenseSlab] && fix_panel<HALF>(rows, inputs, panel.fixed)) {
    const float* const scales = fixed.scales + (k * m.tokens + from * inputs) / kFixedBlock;
    return fixed_times_tokens(panel.fixed, fixed.pairs + pair, scales, panel.sums, m.tokens - from, some, blocks);
  }
  convert_panel<HALF>(rows, inputs, panel.floats);
  panel_times_tokens(panel.floats, m.x + k * m.tokens + from * inputs, panel.sums, m.tokens - from, some, inputs);
}

template <bool HALF>
void panel_rows(const DenseProduct& m, const FixedInput& fixed, int64_t begin, int64_t end) {
  Panel panel;
  for (int64_t from = 0, some = 0; from < m.tokens; from += some) {
    some = tokens_at_once(m.tokens - from);
    for (int64_t n = begin; n < end; n += kPanel) {
      const int64_t there = end - n < kPanel ? end - n : kPanel;
      for (int64_t i = 0; i < some * kPanel; ++i) panel.sums[i] = 0;
      for (int64_t k = 0; k < m.in_features; k += kDenseSlab) {
        const uint16_t* rows[kPanel];
        for (int64_t r = 0; r < kPanel; ++r)  // the last one stands in for those that there are not
          rows[r] = m.w + (n + (r < there ? r : there - 1)) * m.in_features + k;
        const int64_t inputs = m.in_features - k < kDenseSlab ? m.in_features - k : kDenseSlab;
        panel_times_slab<HALF>(panel, rows, m, fixed, from, some, k, inputs);
      }
      float* const y = m.y + from * m.out_features + n;
      store_panel(panel.sums, m.bias ? m.bias + n : nullptr, y, some, there, m.out_features);
    }
  }
}

}  // namespace

void avx2_panel_rows(const DenseProduct& product, const FixedInput& fixed, int64_t begin, int64_t end) {
  if (product.is_half) return panel_rows<true>(product, fixed, begin, end);
  return panel_rows<false>(product, fixed, begin, end);
}
#endif
