// NEON kernels of the linears, for any ARMv8.
#include "kernels.h"

#ifdef QWENRT_ARM64
#include "linear_neon.h"
#include "linear_body.h"

const Kernels* neon_kernels() {
  static const Kernels kernels = {"neon", quant_rows, dense16_rows, scalar_kernels()->quantize_block,
                                  scalar_kernels()->integer_rows};
  return &kernels;
}
#endif
