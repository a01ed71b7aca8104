// What adapters add to a linear's outputs: shares the tokens between the threads.
#include "step/lora.h"

#include <algorithm>

#include "abi/dispatch.h"
#include "pool/thread_pool.h"

namespace {

struct LoraTask {
  const QwenrtLora *begin, *end;
  const LayerKernels* kernels;
  const float* x;
  float* y;
  int64_t inputs, outputs, tokens, tasks;  // tokens: of all pairs, one after the other
};

void lora_task(void* context, int64_t i) {
  const LoraTask& t = *static_cast<const LoraTask*>(context);
  const int64_t first = t.tokens * i / t.tasks, last = t.tokens * (i + 1) / t.tasks;
  int64_t at = 0;
  for (const QwenrtLora* l = t.begin; l < t.end && at < last; ++l) {
    const int64_t count = l->last_token - l->first_token;
    for (int64_t n = std::max(first - at, int64_t(0)); n < std::min(count, last - at); ++n) {
      const int64_t token = l->first_token + n;
      t.kernels->lora(*l, t.x + token * t.inputs, t.inputs, t.y + token * t.outputs + l->first_row);
    }
    at += count;
  }
}

bool before(const QwenrtLora& l, const void* matrix) { return l.matrix < matrix; }

}  // namespace

int add_loras(const QwenrtHandle* with, const QwenrtLora* loras, int64_t count, const QwenrtLinear& w, const float* x,
              float* y, int64_t tokens) {
  LoraTask t{std::lower_bound(loras, loras + count, w.matrix, before), nullptr, layer_kernels(*with), x, y,
             w.in_features, w.out_features, 0, 1};
  int64_t work = 0;
  for (t.end = t.begin; t.end < loras + count && t.end->matrix == w.matrix; ++t.end) {
    const QwenrtLora& l = *t.end;
    if (l.rank < 0 || l.rank > QWENRT_LORA_RANK || l.first_token < 0 || l.last_token > tokens || l.first_row < 0 ||
        l.first_row + l.rows > w.out_features)
      return QWENRT_BAD_ARGUMENT;
    const int64_t own = l.last_token - l.first_token;
    t.tokens += own;
    work += own * l.rank * (w.in_features + l.rows);
  }
  if (!t.tokens) return QWENRT_OK;
  t.tasks = layer_tasks(t.tokens, work);
  parallel_for(t.tasks, lora_task, &t);
  return QWENRT_OK;
}
