// Where the halves of a bfloat16 weight lie in a chunk, and rows as they were.
#pragma once
#include "isa/linear_kernels.h"

// The lower byte of input i of a chunk, among its 64. Kernels take 32 of them at once, join each with its upper byte
// within the halves of a register, and take every other of these pairs for a float: so 8 neighbouring inputs come out
// together, by a shift or a mask, which are cheaper than another shuffle.
static inline int64_t byte_of(int64_t i) {
  return i / 32 * 32 + i / 16 % 2 * 8 + i / 4 % 2 * 16 + i % 4 * 2 + i / 8 % 2;
}

// One row of w -> out [in_features].
void unpack_row(const Kernels& kernels, const QwenrtDense12& w, int64_t row, uint16_t* out);
