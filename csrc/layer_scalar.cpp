// A decoder layer's kernels for any CPU.
#include "attention_body.h"

const LayerKernels* scalar_layer_kernels() {
  static const LayerKernels kernels = {attend, combine};
  return &kernels;
}
