// A decoder layer's kernels for AVX2 and FMA.
#include "isa/layer_kernels.h"

#ifdef QWENRT_X86
#include "attention/body.h"
#include "step/delta_body.h"
#include "step/elementwise_body.h"
#include "step/lora_body.h"

const LayerKernels* avx2_layer_kernels() {
  static const LayerKernels kernels = {attend,       combine,  rms_norm,   silu_and_mul,    gate_output,
                                       rotary_store, convolve, delta_head, sum_exponentials,
                                       lora};
  return &kernels;
}
#endif
