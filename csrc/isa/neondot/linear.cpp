// NEON kernels of the linears for CPUs with dot products of bytes.
#include "isa/linear_kernels.h"

#ifdef QWENRT_ARM64
#include "isa/neon/vectors.h"

#include "linear/integer_body.h"

const Kernels* neondot_kernels() {
  static const Kernels kernels = {"neondot", quant_rows, dense16_rows, round_block, integer_rows};
  return &kernels;
}
#endif
