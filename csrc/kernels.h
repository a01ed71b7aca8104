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

struct Kernels {
  const char* name;
  // Rows of blocks [begin, end) of y [tokens][out_features].
  void (*quant_rows)(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end);
  // Rows [begin, end) of y [tokens][out_features].
  void (*dense16_rows)(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                       int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end);
};

const Kernels* scalar_kernels();
#if defined(__x86_64__) || defined(_M_X64)
#define QWENRT_X86 1
const Kernels* avx2_kernels();
#endif
