// AVX-512 kernels of a decoder layer: attention over codes gains from it; the rest waits for memory and is AVX2's.
#include "isa/layer_kernels.h"

#ifdef QWENRT_X86
#define QWENRT_VNNI 1
#include "attention/body.h"

const LayerKernels* avx512_layer_kernels() {
  static const LayerKernels kernels = [] {
    LayerKernels made = *avx2_layer_kernels();
    made.attend = attend;
    return made;
  }();
  return &kernels;
}
#endif
