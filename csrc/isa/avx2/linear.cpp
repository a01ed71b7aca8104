// AVX2, FMA and F16C kernels of the linears: those in float32 are the common bodies over AVX2's vectors, but for many
// tokens beside 16-bit weights; the others have files of their own.
#include "isa/linear_kernels.h"

#ifdef QWENRT_X86
#include "isa/avx2/vectors.h"

#include "linear/linear_body.h"

namespace {

// Which of the two depends on the number of tokens alone: results do not depend on how the rows are shared.
void dense16_rows_or_panels(const DenseProduct& product, int64_t begin, int64_t end) {
  if (product.tokens >= kPanelTokens) return avx2_panel_rows(product, {}, begin, end);
  dense16_rows(product, begin, end);
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = [] {
    Kernels made{"avx2", quant_rows, dense16_rows_or_panels, avx2_round_block, avx2_integer_rows};
    made.fixed_rows = avx2_panel_rows;
    made.dense12_rows = avx2_dense12_rows;
    made.unpack12 = avx2_unpack12;
    made.dense12_tokens = 23;
    made.pairs = true;
    made.dense_tiles_from = kPanelTokens;
    return made;
  }();
  return &kernels;
}
#endif
