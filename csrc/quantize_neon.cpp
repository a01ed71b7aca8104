// Rounding of weights for NEON.
#include "kernels.h"

#ifdef QWENRT_ARM64
#include "quantize_body.h"

bool neon_quantize_group(const QwenrtRounding& a, const float* w, int64_t padded, uint8_t* codes, float* scale,
                           float* zero) {
  return quantize_group(a, w, padded, codes, scale, zero);
}
#endif
