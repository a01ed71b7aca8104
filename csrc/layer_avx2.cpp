// A decoder layer's kernels for AVX2 and FMA.
#include "layer_kernels.h"

#ifdef QWENRT_X86
#include "attention_body.h"
#include "elementwise_body.h"

const LayerKernels* avx2_layer_kernels() {
  static const LayerKernels kernels = {attend, combine, rms_norm, silu_and_mul, rotary_store, sum_exponentials};
  return &kernels;
}
#endif
