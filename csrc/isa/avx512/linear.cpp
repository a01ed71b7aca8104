// AVX-512 kernels of the linears, with VNNI's dot products of bytes.
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include "isa/avx512/vectors.h"

#include "linear/integer_body.h"

namespace {

// AVX2's is as fast for 4-bit codes; beside 8-bit ones it gives pairs.
int round_for_bytes(const float* x, int64_t n, int bits, float narrow, float outlier, int32_t* low, int32_t* high,
                    float* scale, int32_t* sum) {
  const auto round = bits == 4 ? avx2_kernels()->round_block : round_block;
  return round(x, n, bits, narrow, outlier, low, high, scale, sum);
}

}  // namespace

const Kernels* avx512vnni_kernels() {
  static const Kernels kernels = {
      "avx512vnni", quant_rows, dense16_rows, nullptr, nullptr, round_for_bytes, integer_rows,
      avx2_kernels()->dense12_rows, avx2_kernels()->unpack12, 0, 0, 0};
  return &kernels;
}
#endif
