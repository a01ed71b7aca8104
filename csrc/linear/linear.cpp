// qwenrt_linear: a linear of whatever kind, and linears in parts.
#include <string.h>

#include <algorithm>

#include "abi/dispatch.h"
#include "linear/linears.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

Scratch scratch;

// One part after the other; where there are several tokens, its rows lie apart in y.
int linear_of_parts(const QwenrtHandle* with, const QwenrtLinear& w, const float* x, float* y, int64_t tokens) {
  const QwenrtLinear* const parts = static_cast<const QwenrtLinear*>(w.matrix);
  const QwenrtLinear* const end = parts + w.part_count;
  int64_t widest = 0;
  for (const QwenrtLinear* part = parts; part < end; ++part) {
    if (part->kind == QWENRT_PARTS) return QWENRT_BAD_ARGUMENT;
    widest = std::max(widest, part->out_features);
  }
  float* rows = nullptr;
  if (tokens > 1 && !scratch.room(array(rows, tokens * widest))) return QWENRT_NO_MEMORY;
  for (const QwenrtLinear* part = parts; part < end; y += part++->out_features) {
    if (const int status = qwenrt_linear(with, part, x, tokens > 1 ? rows : y, tokens)) return status;
    const int64_t width = part->out_features;
    for (int64_t t = 0; tokens > 1 && t < tokens; ++t)
      memcpy(y + t * w.out_features, rows + t * width, size_t(width) * sizeof(float));
  }
  return QWENRT_OK;
}

}  // namespace

int qwenrt_linear(const QwenrtHandle* with, const QwenrtLinear* w, const float* x, float* y, int64_t tokens) {
  if (tokens < 1) return QWENRT_OK;
  const PoolLock lock(with->threads);
  const Kernels& kernels = linear_kernels(*with);
  const bool rounded = w->activations.kind != QWENRT_EXACT, is_half = w->kind == QWENRT_DENSE_FLOAT16;
  switch (w->kind) {
    case QWENRT_QUANTIZED:
      return quantized_linear(kernels, *static_cast<const QwenrtQuantMatrix*>(w->matrix), w->activations, x, y, tokens);
    case QWENRT_DENSE_BFLOAT16:
    case QWENRT_DENSE_FLOAT16: {
      const uint16_t* const weight = static_cast<const uint16_t*>(w->matrix);
      return dense16_linear(kernels, {weight, w->bias, x, y, tokens, w->out_features, w->in_features, is_half},
                            rounded);
    }
    case QWENRT_DENSE12:
      return dense12_linear(kernels, *static_cast<const QwenrtDense12*>(w->matrix), x, y, tokens, rounded);
    case QWENRT_PARTS:
      return linear_of_parts(with, *w, x, y, tokens);
    case QWENRT_ELSEWHERE:
      return QWENRT_NOT_SERVED;
    default:
      return QWENRT_BAD_ARGUMENT;
  }
}
