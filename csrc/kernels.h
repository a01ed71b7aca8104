// The table of kernels of one instruction set. Translation units built with special flags include nothing but this,
// so that no inline function of the standard library is emitted with instructions the CPU may lack.
#pragma once
#include "qwenrt_cpu.h"

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

// Activations rounded to int16 or int8 (bytes), a scale for each block of one group's inputs. A block is at most
// kBlockInputs inputs, so that sums over it fit in int32 whatever the group's size:
//   |sum (code - zero) q| <= 2^8 * kBlockInputs * 32767 < 2^30.
// x[tile][word][place][token of tile] holds, in 32 bits, the inputs that a kernel multiplies with one register of
// codes: place p has inputs p and p + 32 / bits / 2 of its word as int16, or p, p + 2, p + 4 and p + 6 as int8.
struct IntegerInput {
  const int32_t* x;     // [tiles][words of a row][places][tile]
  const float* scales;  // [tiles][blocks][tile]
  const int32_t* sums;  // [tiles][blocks][tile]: of the block's rounded activations
  int64_t tiles;
  int64_t tile;
  int64_t tokens;
  int64_t words_per_block;  // the last block of a group may have fewer
  int64_t blocks_per_group;
  int32_t bytes;  // int8 activations; only beside 4-bit codes
};

constexpr int64_t kBlockInputs = 128;
constexpr int64_t kIntegerTokens = 128;         // most tokens of one IntegerInput
constexpr float kLargestActivation = 4.6e33f;   // 128 of them still are finite when code and scale were multiplied in
constexpr float kSmallestActivation = 7.9e-31f;  // 2^-100: a block of smaller ones counts as zeros

struct Kernels {
  const char* name;
  // Rows of blocks [begin, end) of y [tokens][out_features].
  void (*quant_rows)(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end);
  // Rows [begin, end) of y [tokens][out_features].
  void (*dense16_rows)(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                       int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end);
  // n activations, a multiple of 8, to q = round(x / scale), ties to even, with |q| <= limit. Returns 0 where they are
  // not finite or above kLargestActivation.
  int (*quantize_block)(const float* x, int64_t n, float limit, int32_t* q, float* scale, int32_t* sum);
  // Rows of blocks [begin, end) of y [tokens][out_features]. Sums of a block are exact; blocks are added in their order
  // by one fused multiply-add each, so that every kernel and every number of tokens gives the same bits.
  void (*integer_rows)(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end);
};

const Kernels* scalar_kernels();
// Defined where the build has them: see dispatch.cpp.
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* neon_kernels();
const Kernels* neondot_kernels();

#if defined(__x86_64__) || defined(_M_X64)
#define QWENRT_X86 1
#elif defined(__aarch64__)
#define QWENRT_ARM64 1
#endif
