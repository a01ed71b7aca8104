// Floats of 16 bits to float32 on any CPU. Local to the including file, as isa/vector.h is.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
  if (body >= 0x7c00) return from_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product corrects it, subnormals included.
  return from_bits(sign | body << 13) * from_bits(0x77800000);  // 2^112
}

}  // namespace
