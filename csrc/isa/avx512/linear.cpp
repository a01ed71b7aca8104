// AVX-512 kernels of the linears, with VNNI's dot products of bytes.
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include "isa/avx512/vectors.h"

#include "linear/integer_body.h"

namespace {

// AVX2's is as fast for 4-bit codes; beside 8-bit ones it gives pairs.
BlockKind round_for_bytes(const float* x, int64_t n, int bits, NarrowRule narrow, RoundedBlock& out) {
  const auto round = bits == 4 ? avx2_kernels()->round_block : round_block;
  return round(x, n, bits, narrow, out);
}

}  // namespace

const Kernels* avx512vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels made{"avx512vnni", quant_rows, dense16_rows, round_for_bytes, integer_rows};
    made.dense12_rows = avx2_kernels()->dense12_rows;
    made.unpack12 = avx2_kernels()->unpack12;
    made.dense12_tokens = 15;
    return made;
  }();
  return &kernels;
}
#endif
