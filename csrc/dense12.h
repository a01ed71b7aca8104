// Where the halves of a bfloat16 weight lie in a chunk, and rows as they were.
#pragma once
#include "kernels.h"

// The lower byte of input i of a chunk, among its 64. Kernels take 32 of them at once, join each with its upper byte and
// then pairs of bytes to floats, both within the halves of a register: so 8 neighbouring inputs come out together.
inline int64_t byte_of(int64_t i) { return i / 32 * 32 + i / 4 % 2 * 16 + i / 8 % 4 * 4 + i % 4; }

// One row of w -> out [in_features].
void unpack_row(const Kernels& kernels, const QwenrtDense12& w, int64_t row, uint16_t* out);
