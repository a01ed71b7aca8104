// Rounding of weights for AVX2.
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include "linear/quantize_body.h"

bool avx2_quantize_group(const QwenrtRounding& a, const float* w, int64_t padded, uint8_t* codes, float* scale,
                           float* zero) {
  return quantize_group(a, w, padded, codes, scale, zero);
}
#endif
