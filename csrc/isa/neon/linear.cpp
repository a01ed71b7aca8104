// NEON kernels of the linears, for any ARMv8.
#include "isa/linear_kernels.h"

#ifdef QWENRT_ARM64
#include "isa/neon/vectors.h"

#include "linear/integer_body.h"

const Kernels* neon_kernels() {
  static const Kernels kernels = {"neon", quant_rows, dense16_rows, round_block, integer_rows};
  return &kernels;
}
#endif
