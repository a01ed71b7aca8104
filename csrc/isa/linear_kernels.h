// The table of kernels of one instruction set. Translation units built with special flags include nothing but this,
// so that no inline function of the standard library is emitted with instructions the CPU may lack.
#pragma once
#include "abi/qwenrt_cpu.h"

// Activations as the quantised kernels read them: tokens in tiles of `tile` (1, 2 or 4), x[tile][input][token of tile]
// with the inputs padded per group as the words are, and each input multiplied by 2^(-bits * place in its word), the
// last place excepted: a code is then converted where it lies in its word, without a shift.
struct QuantInput {
  const float* x;     // [tiles][padded inputs][tile]
  const float* sums;  // [tiles][groups][tile]: unscaled sums of the group's activations
  int64_t tiles;
  int64_t tile;
  int64_t tokens;
  int64_t padded;  // groups * words_per_group * 32 / bits
};

// Activations rounded to integers, a scale for each block of one group's inputs. A block beside 4-bit codes is
// kByteBlock inputs at most, else kPairBlock, so that sums over it fit in int32 whatever the group's size:
//   |sum code q| <= 2^8 * kPairBlock * 32767 < 2^31, and with 4-bit codes products of bytes fit in int16.
//
// As bytes, |q| <= 127 in a narrow block, and in a wide one q = 256 * high + low, both int8. As pairs,
// a block is wide without being split, and all of it is in `low`.
// [tile][word][place][token of tile] holds, in 32 bits, the inputs that a kernel multiplies with one register of codes:
//   bytes, 4-bit codes: place p has inputs p, p + 2, p + 4 and p + 6 of its word; bytes, 8-bit codes: all four;
//   pairs, 8-bit codes: place p has inputs p and p + 2.
// By token, all tokens are one tile of a multiple of kTokenTile, whose words lie as [token][word][place], and `wide` is
// [block][token], a byte each; the upper bytes of a narrow block are zeros.
enum class Layout { kTiles, kByToken };

struct IntegerInput {
  const int32_t* low;
  const int32_t* high;  // of wide blocks; elsewhere anything
  const uint8_t* wide;  // [tiles][blocks]: bit t: token t of the tile needs `high`; the others have zeros there
  const float* scales;  // [tiles][blocks][tile]
  const float* sums;    // [tiles][groups][tile]: of scale * q
  int64_t tiles;
  int64_t tile;
  int64_t tokens;
  int64_t words_per_block;  // the last block of a group may have fewer
  int64_t blocks_per_group;
  Layout layout;
  int64_t token_stride;  // by token: 32-bit words from one to the next
  bool pairs;
};

constexpr int64_t kTokenTile = 16;  // of a kernel that wants them by token

constexpr int64_t kByteBlock = 32;
constexpr int64_t kPairBlock = 128;
constexpr int64_t kIntegerTokens = 128;         // most tokens of one IntegerInput
constexpr float kLargestActivation = 4.6e33f;   // 128 of them still are finite when code and scale were multiplied in
constexpr float kSmallestActivation = 7.9e-31f;  // 2^-100: a block of smaller ones counts as zeros

// Which blocks are narrow: those with no activation above `largest` (below 0: none is), nor above `to_mean` times their
// mean.
struct NarrowRule {
  float largest;
  float to_mean;
};

enum class BlockKind {
  kNotFinite,  // or above kLargestActivation
  kNarrow,     // or pairs
  kWide,
};

// One block of one token: q = round(x / scale), ties to even, as IntegerInput's low and, where it is wide, high say of
// a tile of one token.
struct RoundedBlock {
  int32_t low[kPairBlock];
  int32_t high[kPairBlock];
  float scale;
  int32_t sum;  // of q
};

// Activations of a dense linear in tiles: [slab of kDenseSlab inputs][tile][input of slab][token of tile].
constexpr int64_t kDenseSlab = 256;
constexpr int64_t kDenseTile = 6;  // at most

// The same in fixed point, for kernels that have fixed_rows: kFixedBlock inputs of a token share a scale. Two int16 of
// at most kFixedLimit in 32 bits, the earlier input in the lower ones; kFixedBlock * kFixedLimit^2 < 2^31.
constexpr int64_t kFixedBlock = 32;
constexpr float kFixedLimit = 8191;
constexpr float kFixedFar = 128;       // times smaller than the largest beside it, a number has six bits or fewer
constexpr float kLargestFixed = 1e29f;  // larger numbers stay in float32, which knows what is too large to sum
struct FixedInput {
  const int32_t* pairs;       // [slab][tile][pair of slab][token of tile]; NULL: float32 is asked for
  const float* scales;        // [slab][tile][block of slab][token of tile]
  const uint8_t* in_float32;  // [slabs]: whether the slab is in float32 alone
};

// Activations as sums of two bfloat16, high and low, which keep 16 bits of each: [kTokenTile tokens][pair of inputs]
// [token][2]; what is past the last token is anything.
struct SplitInput {
  const uint16_t* high;  // NULL: float32 is asked for
  const uint16_t* low;
};

constexpr int64_t kSplitRows = 64;    // that such a kernel wants together
constexpr int64_t kSplitInputs = 32;  // a row must have a multiple of these

// The product of a 16-bit weight and all tokens: y [tokens][out_features] = x W^T + bias.
struct DenseProduct {
  const uint16_t* w;  // [out_features][in_features], row-major, float16 (is_half) or bfloat16
  const float* bias;  // [out_features] or NULL
  const float* x;     // [tokens][in_features], from dense_tiles_from tokens on in tiles
  float* y;
  int64_t tokens, out_features, in_features;
  bool is_half;
};

// The tokens of the next tile: all as equal as can be, for small ones leave multiply-adds waiting for each other.
static inline int64_t next_tile(int64_t tokens) {
  const int64_t tiles = (tokens + kDenseTile - 1) / kDenseTile;
  return (tokens + tiles - 1) / tiles;
}

// Chunks of one row of a 12-bit matrix.
static inline int64_t chunks_of(const QwenrtDense12& w) { return (w.in_features + QWENRT_CHUNK - 1) / QWENRT_CHUNK; }

// From one token's activations to the next one's beside 12 bits: whole chunks, and a line more, for tokens that are a
// power of two apart would take each other's places in the first cache.
static inline int64_t token_stride12(const QwenrtDense12& w) { return chunks_of(w) * QWENRT_CHUNK + 16; }

static inline int64_t places_of(int bits, bool pairs) { return pairs || bits == 4 ? 2 : 1; }

struct Kernels {
  const char* name;
  // Rows of blocks [begin, end) of y [tokens][out_features].
  void (*quant_rows)(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end);
  // Rows [begin, end).
  void (*dense16_rows)(const DenseProduct& product, int64_t begin, int64_t end);
  // n activations, a multiple of 8 and of a word's.
  BlockKind (*round_block)(const float* x, int64_t n, int bits, NarrowRule narrow, RoundedBlock& out);
  // Rows of blocks [begin, end) of y [tokens][out_features]. A block's sum is exact and is added, in the order of
  // blocks, by one fused multiply-add; so is a group's, less zero * sums. Every kernel, and every number of tokens,
  // gives the same bits.
  void (*integer_rows)(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end);

  // What follows is NULL or 0 where a set gains nothing from it.

  // As dense16_rows, with x in tiles and, for weights that bear it, in fixed point.
  void (*fixed_rows)(const DenseProduct& product, const FixedInput& fixed, int64_t begin, int64_t end) = nullptr;
  // As dense16_rows of bfloat16 weights, with x split as well.
  void (*split_rows)(const DenseProduct& product, const SplitInput& split, int64_t begin, int64_t end) = nullptr;
  // Rows [begin, end) of y [tokens][out_features] for up to dense12_tokens tokens. x [tokens][token_stride12], inputs
  // past the row's end are zeros.
  void (*dense12_rows)(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, int64_t begin,
                       int64_t end) = nullptr;
  // One row as it was, out [in_features].
  void (*unpack12)(const QwenrtDense12& w, int64_t row, uint16_t* out) = nullptr;
  int64_t dense12_tokens = 0;    // beside more, 12 bits are turned back into 16 and multiplied as these
  bool pairs = false;            // whether 8-bit codes want pairs
  int64_t dense_tiles_from = 0;  // tokens
  int64_t by_token_from = 0;     // so many tokens lie by token in an IntegerInput
};

const Kernels* scalar_kernels();
// Defined where the build has them: see abi/dispatch.cpp.
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();
const Kernels* neondot_kernels();

#if defined(__x86_64__) || defined(_M_X64)
#define QWENRT_X86 1
#elif defined(__aarch64__)
#define QWENRT_ARM64 1
#endif
