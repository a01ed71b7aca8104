// Norm, rotary with its store, and silu: shares their rows between the threads.
#include "abi/dispatch.h"
#include "pool/thread_pool.h"

namespace {

constexpr int64_t kRowWork = 4;    // multiply-adds that moving one element is worth
constexpr int64_t kSiluWork = 16;  // and one exponential

struct NormTask {
  const float *x, *weight;
  float* out;
  int64_t rows, dim, tasks;
  float eps;
  const LayerKernels* kernels;
};

void norm_task(void* context, int64_t i) {
  const NormTask& t = *static_cast<const NormTask*>(context);
  for (int64_t r = t.rows * i / t.tasks; r < t.rows * (i + 1) / t.tasks; ++r)
    t.kernels->rms_norm(t.x + r * t.dim, t.weight, t.eps, t.dim, t.out + r * t.dim);
}

struct SiluTask {
  const float* gate_up;
  float* out;
  int64_t count, inner, tasks;
  const LayerKernels* kernels;
};

void silu_task(void* context, int64_t i) {
  const SiluTask& t = *static_cast<const SiluTask*>(context);
  const int64_t last = t.count * (i + 1) / t.tasks;
  for (int64_t at = t.count * i / t.tasks; at < last;) {
    const int64_t token = at / t.inner, column = at % t.inner;
    const int64_t count = t.inner - column < last - at ? t.inner - column : last - at;
    const float* gate = t.gate_up + token * 2 * t.inner + column;
    t.kernels->silu_and_mul(gate, gate + t.inner, count, t.out + at);
    at += count;
  }
}

struct GateTask {
  const float *x, *gate;
  float* out;
  int64_t token_stride, head_stride, count, heads, head_dim, tasks;  // count: of rows
  const LayerKernels* kernels;
};

void gate_task(void* context, int64_t i) {
  const GateTask& t = *static_cast<const GateTask*>(context);
  for (int64_t row = t.count * i / t.tasks; row < t.count * (i + 1) / t.tasks; ++row) {
    const float* gate = t.gate + row / t.heads * t.token_stride + row % t.heads * t.head_stride;
    t.kernels->gate_output(t.x + row * t.head_dim, gate, t.head_dim, t.out + row * t.head_dim);
  }
}

struct RotaryTask {
  const QwenrtRotary* a;
  const QwenrtCache* cache;
  int64_t tokens, tasks;
  const LayerKernels* kernels;
};

void rotary_task(void* context, int64_t i) {
  const RotaryTask& t = *static_cast<const RotaryTask*>(context);
  for (int64_t token = t.tokens * i / t.tasks; token < t.tokens * (i + 1) / t.tasks; ++token)
    t.kernels->rotary_store(*t.a, t.cache, token);
}

}  // namespace

int qwenrt_rms_norm(const QwenrtHandle* with, const float* x, const float* weight, float* out, int64_t rows,
                    int64_t dim, float eps) {
  PoolLock lock(with->threads);
  NormTask t{x, weight, out, rows, dim, 1, eps, layer_kernels(*with)};
  t.tasks = layer_tasks(rows, rows * dim * kRowWork);
  parallel_for(t.tasks, norm_task, &t);
  return QWENRT_OK;
}

int qwenrt_silu_and_mul(const QwenrtHandle* with, const float* gate_up, float* out, int64_t tokens, int64_t inner) {
  if (tokens < 1 || inner < 1) return QWENRT_OK;
  PoolLock lock(with->threads);
  SiluTask t{gate_up, out, tokens * inner, inner, 1, layer_kernels(*with)};
  t.tasks = layer_tasks(t.count / 1024, t.count * kSiluWork);
  parallel_for(t.tasks, silu_task, &t);
  return QWENRT_OK;
}

int qwenrt_gate_output(const QwenrtHandle* with, const float* x, const float* gate, int64_t token_stride,
                       int64_t head_stride, float* out, int64_t tokens, int64_t heads, int64_t head_dim) {
  if (tokens < 1 || heads < 1 || head_dim < 1) return QWENRT_OK;
  PoolLock lock(with->threads);
  GateTask t{x, gate, out, token_stride, head_stride, tokens * heads, heads, head_dim, 1, layer_kernels(*with)};
  t.tasks = layer_tasks(t.count, t.count * head_dim * kSiluWork);
  parallel_for(t.tasks, gate_task, &t);
  return QWENRT_OK;
}

int qwenrt_rotary_store(const QwenrtHandle* with, const QwenrtRotary* a, const QwenrtCache* cache, int64_t tokens) {
  if (a->head_dim < 8 || a->head_dim > 256 || a->head_dim % 8 || a->rotary_dim % 2 || a->rotary_dim > a->head_dim)
    return QWENRT_BAD_ARGUMENT;
  PoolLock lock(with->threads);
  RotaryTask t{a, cache, tokens, 1, layer_kernels(*with)};
  t.tasks = layer_tasks(tokens, tokens * (a->num_heads + 2 * a->num_kv_heads) * a->head_dim * kRowWork);
  parallel_for(t.tasks, rotary_task, &t);
  return QWENRT_OK;
}
