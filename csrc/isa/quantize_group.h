// Rounding of one group of weights, for one instruction set. Its units are compiled without contraction: the definition
// in qwenrt/ops/packing.py rounds each product and each sum by itself, and its bits are wanted.
#pragma once
#include "abi/qwenrt_cpu.h"

constexpr int64_t kSumLanes = 32;  // sums run over every 32nd element, and these are added by halves

// w [padded], a multiple of kSumLanes, zeros past the group's end -> codes [padded], its scale and its zero.
// False where a weight or the scale is not finite.
typedef bool QuantizeGroup(const QwenrtRounding& a, const float* w, int64_t padded, uint8_t* codes, float* scale,
                           float* zero);

QuantizeGroup scalar_quantize_group;
QuantizeGroup avx2_quantize_group;
QuantizeGroup neon_quantize_group;
