// A decoder layer's kernels for NEON.
#include "layer_kernels.h"

#ifdef QWENRT_ARM64
#include "attention_body.h"
#include "elementwise_body.h"

const LayerKernels* neon_layer_kernels() {
  static const LayerKernels kernels = {attend, combine, rms_norm, silu_and_mul, rotary_store, sum_exponentials};
  return &kernels;
}
#endif
