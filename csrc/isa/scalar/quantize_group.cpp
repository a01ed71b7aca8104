// Rounding of weights for any CPU.
#define QWENRT_PORTABLE 1
#include "linear/quantize_body.h"

bool scalar_quantize_group(const QwenrtRounding& a, const float* w, int64_t padded, uint8_t* codes, float* scale,
                           float* zero) {
  return quantize_group(a, w, padded, codes, scale, zero);
}
