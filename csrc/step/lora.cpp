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
    const int64_t count = std::max(l->last_token - l->first_token, int64_t(0));
    const int64_t begin = std::max(first - at, int64_t(0)), end = std::min(count, last - at);
    const int64_t token = l->first_token + begin;
    if (begin < end)
      t.kernels->lora(*l, t.x + token * t.inputs, t.inputs, t.y + token * t.outputs + l->first_row, t.outputs,
                      end - begin);
    at += count;
  }
}

bool before(const QwenrtLora& l, const void* matrix) { return l.matrix < matrix; }

// Those from `begin` up to `end`.
int add(const QwenrtHandle* with, const QwenrtLora* begin, const QwenrtLora* end, const float* x, int64_t inputs,
        float* y, int64_t outputs, int64_t tokens) {
  LoraTask t{begin, end, layer_kernels(*with), x, y, inputs, outputs, 0, 1};
  int64_t work = 0;
  for (const QwenrtLora* l = begin; l < end; ++l) {
    if (l->rank < 0 || l->rank > QWENRT_LORA_RANK || l->first_token < 0 || l->last_token > tokens ||
        l->first_row < 0 || l->rows < 0 || l->first_row + l->rows > outputs)
      return QWENRT_BAD_ARGUMENT;
    const int64_t own = std::max(l->last_token - l->first_token, int64_t(0));
    t.tokens += own;
    work += own * l->rank * (inputs + l->rows);
  }
  if (!t.tokens) return QWENRT_OK;
  t.tasks = layer_tasks(t.tokens, work);
  parallel_for(t.tasks, lora_task, &t);
  return QWENRT_OK;
}

}  // namespace

int add_loras(const QwenrtHandle* with, const QwenrtLora* loras, int64_t count, const QwenrtLinear& w, const float* x,
              float* y, int64_t tokens) {
  const QwenrtLora* const begin = std::lower_bound(loras, loras + count, w.matrix, before);
  const QwenrtLora* end = begin;
  while (end < loras + count && end->matrix == w.matrix) ++end;
  return add(with, begin, end, x, w.in_features, y, w.out_features, tokens);
}

int qwenrt_lora(const QwenrtHandle* with, const QwenrtLora* loras, int64_t count, const float* x, int64_t inputs,
                float* y, int64_t outputs, int64_t tokens) {
  PoolLock lock(with->threads);
  return add(with, loras, loras + count, x, inputs, y, outputs, tokens);
}
