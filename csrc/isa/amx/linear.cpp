// AMX kernels of prompts: a tile of 16 tokens times one of 16 rows is one instruction. Fewer tokens, and everything
// else, are AVX-512's.
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include "isa/avx512/vectors.h"

namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and 32-bit words of such a row
static_assert(kTile == kTokenTile && kTile == kBlocks * QWENRT_BLOCK,
              "a tile's rows are tokens, its columns rows of two row blocks");

struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tile instructions read and write memory behind the compiler's back.
INLINE void compiler_barrier() { asm volatile("" ::: "memory"); }

// Registers 0 to 3 are sums [16][16]; 4 and 5 left factors [16][WORDS], 6 and 7 right ones [WORDS][16].
template <int WORDS>
void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.rows[i] = kTile, config.row_bytes[i] = 4 * kTile;
  for (int i = 4; i < 6; ++i) config.row_bytes[i] = 4 * WORDS;
  for (int i = 6; i < 8; ++i) config.rows[i] = WORDS;
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic does not say that it reads all of it
  _tile_loadconfig(&config);
}

// ---- quantised weights

constexpr int kPanels = 2;   // of kTile rows, that share a tile of tokens
constexpr int kAtOnce = 4;   // blocks of activations
constexpr int kMostSteps = 2;

template <int BITS>
constexpr int kWords = BITS == 4 ? 8 : 16;  // of one tile of codes
template <int BITS>
constexpr int kPlaces = BITS == 4 ? 2 : 1;

struct Rows {  // of the panels, as row blocks
  int64_t at[kPanels][kBlocks];
};

// Codes of kAtOnce blocks; words that a block lacks are zeros, whatever the activations beside them are.
struct Codes {
  alignas(64) uint32_t words[kAtOnce][kMostSteps * kTile][kPanels][kTile];
};
struct Dots {
  alignas(64) int32_t low[kAtOnce][kPanels][kTile][kTile];  // [token][row]
  alignas(64) int32_t high[kAtOnce][kPanels][kTile][kTile];
};
struct Totals {
  alignas(64) float sums[kIntegerTokens][kPanels][kTile];  // of a group that has begun and not ended
  alignas(64) float totals[kIntegerTokens][kPanels][kTile];
};

// Blocks [first, first + count) of a row's, and of each what belongs to it.
struct Batch {
  int count;
  int64_t first;
  int64_t word[kAtOnce], words[kAtOnce], group[kAtOnce];
  bool ends[kAtOnce];  // its group
};

Batch batch_at(const QwenrtQuantMatrix& w, const IntegerInput& in, int64_t first) {
  const int64_t all = w.groups * in.blocks_per_group;
  Batch batch{};
  batch.first = first;
  for (int64_t at = first; at < all && batch.count < kAtOnce; ++at) {
    const int i = batch.count++;
    const int64_t part = at % in.blocks_per_group, skipped = part * in.words_per_block;
    const int64_t rest = w.words_per_group - skipped;
    batch.group[i] = at / in.blocks_per_group;
    batch.word[i] = batch.group[i] * w.words_per_group + skipped;
    batch.words[i] = rest < in.words_per_block ? rest : in.words_per_block;
    batch.ends[i] = part + 1 == in.blocks_per_group;
  }
  return batch;
}

template <int BITS>
int64_t steps_of(int64_t words) {
  return (words * kPlaces<BITS> + kWords<BITS> - 1) / kWords<BITS>;
}

template <int BITS>
void unpack(const QwenrtQuantMatrix& w, const Batch& batch, const Rows& blocks, Codes& codes) {
  const int64_t row_words = w.groups * w.words_per_group;
  for (int p = 0; p < kPanels; ++p) {
    const uint32_t* words[kBlocks];
    for (int b = 0; b < kBlocks; ++b) words[b] = w.words + blocks.at[p][b] * row_words * QWENRT_BLOCK;
    for (int i = 0; i < batch.count; ++i) {
      int64_t to = 0;
      for (int64_t n = 0; n < batch.words[i]; ++n) {
        const Words word = load_words(words, (batch.word[i] + n) * QWENRT_BLOCK);
        UNROLL(kPlaces<BITS>, place, {
          const Words bytes = bytes_at<BITS, place>(word);
          _mm512_store_si512(codes.words[i][to++][p], bytes);
        });
      }
      const int64_t end = steps_of<BITS>(batch.words[i]) * kWords<BITS>;
      while (to < end) _mm512_store_si512(codes.words[i][to++][p], _mm512_setzero_si512());
    }
  }
}

INLINE bool any_of_tile(const uint8_t* flags) {
  uint64_t halves[2];
  __builtin_memcpy(halves, flags, sizeof halves);
  return halves[0] | halves[1];
}

// One block: kTile tokens with both panels. Numbers of registers are written out, as the intrinsics want them.
#define QWENRT_MULTIPLY_BLOCK(sum0, sum1, left, x, into)                              \
  _tile_zero(sum0);                                                                   \
  _tile_zero(sum1);                                                                   \
  for (int64_t step = 0; step < steps; ++step) {                                      \
    _tile_loadd(left, (x) + step * kWords<BITS>, row_bytes);                          \
    _tile_loadd(6, codes.words[i][step * kWords<BITS>][0], sizeof codes.words[0][0]); \
    _tile_loadd(7, codes.words[i][step * kWords<BITS>][1], sizeof codes.words[0][0]); \
    _tile_dpbsud(sum0, left, 6);                                                      \
    _tile_dpbsud(sum1, left, 7);                                                      \
  }                                                                                   \
  _tile_stored(sum0, (into)[0], 4 * kTile);                                           \
  _tile_stored(sum1, (into)[1], 4 * kTile)

// The dot products of a batch's blocks; of upper bytes as well where one of them has some.
template <int BITS>
bool multiply(const Codes& codes, const Batch& batch, const IntegerInput& in, int64_t token, Dots& dots) {
  const int64_t row_bytes = 4 * in.token_stride;
  bool wide = false;
  for (int i = 0; i < batch.count; ++i) wide |= any_of_tile(in.wide + (batch.first + i) * in.tile + token);
  for (int i = 0; i < batch.count; ++i) {
    const int64_t x = token * in.token_stride + batch.word[i] * kPlaces<BITS>, steps = steps_of<BITS>(batch.words[i]);
    QWENRT_MULTIPLY_BLOCK(0, 1, 4, in.low + x, dots.low[i]);
    if (!wide) continue;
    QWENRT_MULTIPLY_BLOCK(2, 3, 5, in.high + x, dots.high[i]);
  }
  return wide;
}
#undef QWENRT_MULTIPLY_BLOCK

// How a batch's blocks lie in groups: kAtOnce of them are one group, or each is one; or anything.
enum Shape { kOneGroup, kOneBlockEach, kAnyShape };

// Adds a batch's dot products of up to kTile tokens, as Kernels::integer_rows says.
template <Shape SHAPE, bool WIDE>
void add_batch(const QwenrtQuantMatrix& w, const IntegerInput& in, const Batch& batch, const Rows& blocks,
               int64_t token, const Dots& dots, Totals& totals) {
  const int64_t left = in.tokens - token, tokens = left < kTile ? left : kTile;
  const int count = SHAPE == kAnyShape ? batch.count : kAtOnce;
  const bool begins = SHAPE != kAnyShape || batch.first % in.blocks_per_group == 0;
  const auto ends = [&](int i) {
    return SHAPE == kOneBlockEach || (SHAPE == kOneGroup ? i == kAtOnce - 1 : batch.ends[i]);
  };
  const float* const x_scales = in.scales + batch.first * in.tile + token;
  for (int p = 0; p < kPanels; ++p) {
    Floats scale[kAtOnce], zero[kAtOnce];
    UNROLL(kAtOnce, i, {
      if (i < count && ends(i)) {
        int64_t at[kBlocks];
        for (int b = 0; b < kBlocks; ++b) at[b] = (blocks.at[p][b] * w.groups + batch.group[i]) * QWENRT_BLOCK;
        scale[i] = load_scales(w, at), zero[i] = load_zeros(w, at);
      }
    });
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sum = begins ? all(0.0f) : load(totals.sums[token + t][p]), total = load(totals.totals[token + t][p]);
      UNROLL(kAtOnce, i, {
        if (i < count) {
          Ints dot = _mm512_load_si512(dots.low[i][p][t]);
          if (WIDE) dot = add(dot, times_256(_mm512_load_si512(dots.high[i][p][t])));
          sum = multiply_add(all(x_scales[i * in.tile + t]), to_floats(dot), sum);
          if (ends(i)) {
            const Floats x_sum = all(in.sums[batch.group[i] * in.tile + token + t]);
            total = multiply_add(scale[i], subtract_product(sum, zero[i], x_sum), total);
            sum = all(0.0f);
          }
        }
      });
      if (SHAPE == kAnyShape) _mm512_store_ps(totals.sums[token + t][p], sum);
      _mm512_store_ps(totals.totals[token + t][p], total);
    }
  }
}

using AddBatch = decltype(&add_batch<kAnyShape, false>);

AddBatch adder_of(const Batch& batch, const IntegerInput& in, bool wide) {
  const int64_t parts = in.blocks_per_group;
  if (batch.count == kAtOnce && parts == 1)
    return wide ? add_batch<kOneBlockEach, true> : add_batch<kOneBlockEach, false>;
  if (batch.count == kAtOnce && parts == kAtOnce)
    return wide ? add_batch<kOneGroup, true> : add_batch<kOneGroup, false>;
  return wide ? add_batch<kAnyShape, true> : add_batch<kAnyShape, false>;
}

template <int BITS>
void rows_by_token(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  const int64_t parts = w.groups * in.blocks_per_group;
  Totals totals;
  Codes codes;
  Dots dots;
  configure<kWords<BITS>>();
  for (; begin < end; begin += kPanels * kBlocks) {
    Rows blocks;
    for (int i = 0; i < kPanels * kBlocks; ++i)  // the last one again where there are no more
      blocks.at[i / kBlocks][i % kBlocks] = begin + i < end ? begin + i : end - 1;
    __builtin_memset(totals.totals, 0, size_t(in.tokens) * sizeof totals.totals[0]);
    for (int64_t first = 0; first < parts; first += kAtOnce) {
      const Batch batch = batch_at(w, in, first);
      unpack<BITS>(w, batch, blocks, codes);
      for (int64_t token = 0; token < in.tokens; token += kTile) {
        compiler_barrier();
        const bool wide = multiply<BITS>(codes, batch, in, token, dots);
        compiler_barrier();
        adder_of(batch, in, wide)(w, in, batch, blocks, token, dots, totals);
      }
    }
    for (int64_t token = 0; token < in.tokens; ++token)
      for (int p = 0; p < kPanels; ++p)
        store_rows(w, y + token * w.out_features, load(totals.totals[token][p]), blocks.at[p]);
  }
  _tile_release();
}

void amx_integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  if (in.layout == Layout::kTiles) return avx512vnni_kernels()->integer_rows(w, in, y, begin, end);
  if (w.bits == 4) return rows_by_token<4>(w, in, y, begin, end);
  return rows_by_token<8>(w, in, y, begin, end);
}

// ---- bfloat16 weights

// Sums of two tiles of rows with two of tokens, [row][token]. A tile that is there once is given twice.
struct Quarters {
  alignas(64) float sums[2][2][kTile][kTile];
};

// One tile of tokens, beginning at `x` of both parts, with both tiles of rows.
#define QWENRT_MULTIPLY_TOKENS(sum0, sum1, x)       \
  _tile_loadd(6, split.low + (x), 4 * kTile);       \
  _tile_loadd(7, split.high + (x), 4 * kTile);      \
  _tile_dpbf16ps(sum0, 4, 6);                       \
  _tile_dpbf16ps(sum1, 5, 6);                       \
  _tile_dpbf16ps(sum0, 4, 7);                       \
  _tile_dpbf16ps(sum1, 5, 7)

void multiply_split(const uint16_t* const (&w)[2], const SplitInput& split, const int64_t (&tokens)[2],
                    int64_t in_features, Quarters& out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t row_bytes = in_features * 2;
  for (int64_t k = 0; k < in_features; k += kSplitInputs) {
    _tile_loadd(4, w[0] + k, row_bytes);
    _tile_loadd(5, w[1] + k, row_bytes);
    QWENRT_MULTIPLY_TOKENS(0, 2, tokens[0] * in_features + k * kTile);
    QWENRT_MULTIPLY_TOKENS(1, 3, tokens[1] * in_features + k * kTile);
  }
  _tile_stored(0, out.sums[0][0], 4 * kTile);
  _tile_stored(1, out.sums[0][1], 4 * kTile);
  _tile_stored(2, out.sums[1][0], 4 * kTile);
  _tile_stored(3, out.sums[1][1], 4 * kTile);
}
#undef QWENRT_MULTIPLY_TOKENS

// A tile of sums to rows [row, row + kTile) of `count` tokens from `token` on, turned.
void store_turned(const float (&sums)[kTile][kTile], const DenseProduct& m, int64_t token, int64_t count, int64_t row) {
  alignas(64) static constexpr int32_t places[kTile] = {0,   16,  32,  48,  64,  80,  96,  112,
                                                        128, 144, 160, 176, 192, 208, 224, 240};
  const Floats bias = m.bias ? load(m.bias + row) : all(0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const Floats rows = _mm512_i32gather_ps(_mm512_load_si512(places), &sums[0][t], 4);
    _mm512_storeu_ps(m.y + (token + t) * m.out_features + row, add(rows, bias));
  }
}

void amx_split_rows(const DenseProduct& m, const SplitInput& split, int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / kTile * kTile;
  Quarters quarters;
  configure<int(kTile)>();
  for (int64_t first = begin; first < whole; first += kSplitRows)  // they stay in the cache while all tokens pass
    for (int64_t token = 0; token < m.tokens; token += 2 * kTile)
      for (int64_t row = first; row < whole && row < first + kSplitRows; row += 2 * kTile) {
        const int64_t rows[2] = {row, row + kTile < whole ? row + kTile : row};
        const int64_t tiles[2] = {token, token + kTile < m.tokens ? token + kTile : token};
        compiler_barrier();
        multiply_split({m.w + rows[0] * m.in_features, m.w + rows[1] * m.in_features}, split, tiles, m.in_features,
                       quarters);
        compiler_barrier();
        for (int r = 0; r < 1 + (rows[1] != row); ++r)
          for (int t = 0; t < 1 + (tiles[1] != token); ++t) {
            const int64_t left = m.tokens - tiles[t];
            store_turned(quarters.sums[r][t], m, tiles[t], left < kTile ? left : kTile, rows[r]);
          }
      }
  _tile_release();
  if (whole < end) avx512vnni_kernels()->dense16_rows(m, whole, end);
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels all_of_it = *avx512vnni_kernels();
    all_of_it.name = "amx";
    all_of_it.integer_rows = amx_integer_rows;
    all_of_it.split_rows = amx_split_rows;
    all_of_it.by_token_from = kTokenTile;
    return all_of_it;
  }();
  return &kernels;
}
#endif
