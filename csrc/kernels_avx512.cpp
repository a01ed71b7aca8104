// AVX-512 kernels of the linears.
#include "kernels.h"

#ifdef QWENRT_X86
#include "linear_avx512.h"
#include "linear_body.h"

const Kernels* avx512vnni_kernels() {
  static const Kernels kernels = {"avx512vnni", quant_rows, dense16_rows, avx2_kernels()->quantize_block,
                                  avx2_kernels()->integer_rows};
  return &kernels;
}
#endif
