// Attention over the paged cache: shares sequences, chunks of their context and key heads between the threads.
#include <stdlib.h>
#include <string.h>

#include "layer_kernels.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kSmallWork = 64 * 1024;  // multiply-adds below which waking the workers costs more than it saves

// Grows and is kept: one buffer for all calls, used under PoolLock.
void* scratch(size_t bytes) {
  static void* memory = nullptr;
  static size_t size = 0;
  if (bytes > size) {
    free(memory);
    memory = malloc(bytes);
    size = memory ? bytes : 0;
  }
  return memory;
}

struct Span {  // what one sequence needs
  int64_t first_chunk, chunks;
  int64_t first_task;  // before the division by parts
  int64_t first_row;   // of the partials
};

struct AttentionTasks {
  Attention a;
  const Span* spans;
  Partials partials;
  int64_t parts;      // into which the key heads are divided
  int64_t row_tasks;  // of combine_rows
  const LayerKernels* kernels;
};

Partials from_row(const Partials& p, int64_t row, int64_t head_dim) {
  return {p.largest + row, p.sums + row, p.values + row * head_dim};
}

void attend_task(void* context, int64_t i) {
  const AttentionTasks& t = *static_cast<const AttentionTasks*>(context);
  const int64_t part = i % t.parts, unit = i / t.parts, heads = t.a.cache.num_kv_heads;
  int64_t low = 0, high = t.a.sequences.count - 1;  // the last sequence that begins at or before `unit`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (t.spans[middle].first_task <= unit) low = middle;
    else high = middle - 1;
  }
  const Span& span = t.spans[low];
  const int64_t chunk = unit - span.first_task;
  const int64_t row = span.first_row + chunk * t.a.sequences.q_lens[low] * t.a.num_heads;
  t.kernels->attend(t.a, low, span.first_chunk + chunk, heads * part / t.parts, heads * (part + 1) / t.parts,
                    from_row(t.partials, row, t.a.cache.head_dim));
}

void combine_task(void* context, int64_t i) {
  const AttentionTasks& t = *static_cast<const AttentionTasks*>(context);
  const int64_t dim = t.a.cache.head_dim;
  for (int64_t s = 0; s < t.a.sequences.count; ++s) {
    const Span& span = t.spans[s];
    const int64_t rows = t.a.sequences.q_lens[s] * t.a.num_heads;
    float* out = t.a.out + t.a.sequences.first_tokens[s] * t.a.num_heads * dim;
    const Partials partials = from_row(t.partials, span.first_row, dim);
    for (int64_t r = rows * i / t.row_tasks; r < rows * (i + 1) / t.row_tasks; ++r)
      t.kernels->combine(partials, r, span.chunks, rows, dim, out + r * dim);
  }
}

Span span_of(const Attention& a, int64_t s) {
  const int64_t q_len = a.sequences.q_lens[s], kv_len = a.sequences.kv_lens[s];
  if (q_len <= 0) return {0, 0, 0, 0};
  const int64_t seen = a.window ? kv_len - q_len - a.window + 1 : 0;
  const int64_t first = (seen > 0 ? seen : 0) / kChunk;
  return {first, (kv_len - 1) / kChunk + 1 - first, 0, 0};
}

}  // namespace

int64_t layer_tasks(int64_t most, int64_t work) {
  const int64_t threads = pool_threads();
  if (threads == 1 || work < kSmallWork || most < 1) return 1;
  return most < threads * kTasksPerThread ? most : threads * kTasksPerThread;
}

int qwenrt_attention(const QwenrtSequences* sequences, const QwenrtCache* cache, const float* q, int64_t q_stride,
                     int64_t num_heads, float* out, float scale, int64_t window) {
  const int64_t dim = cache->head_dim, count = sequences->count;
  if (dim < 8 || dim > 256 || dim % 8 || cache->num_kv_heads < 1 || num_heads % cache->num_kv_heads)
    return QWENRT_BAD_ARGUMENT;
  PoolLock lock;
  AttentionTasks t{{*sequences, *cache, q, out, q_stride, num_heads, window, scale}, nullptr, {}, 1, 1, layer_kernels()};
  int64_t units = 0, rows = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Span span = span_of(t.a, s);
    units += span.chunks;
    rows += span.chunks * sequences->q_lens[s] * num_heads;
  }
  const size_t span_bytes = size_t(count) * sizeof(Span);
  void* memory = scratch(span_bytes + size_t(rows) * size_t(dim + 2) * sizeof(float));
  if (!memory) return units ? QWENRT_NO_MEMORY : QWENRT_OK;
  Span* spans = static_cast<Span*>(memory);
  t.spans = spans;
  t.partials.values = reinterpret_cast<float*>(static_cast<char*>(memory) + span_bytes);
  t.partials.largest = t.partials.values + rows * dim;
  t.partials.sums = t.partials.largest + rows;
  int64_t unit = 0, row = 0;
  for (int64_t s = 0; s < count; ++s) {
    spans[s] = span_of(t.a, s);
    spans[s].first_task = unit;
    spans[s].first_row = row;
    unit += spans[s].chunks;
    row += spans[s].chunks * sequences->q_lens[s] * num_heads;
  }
  if (!units) return QWENRT_OK;
  const int64_t tasks = layer_tasks(units * cache->num_kv_heads, 2 * rows * dim * kChunk);
  t.parts = (tasks + units - 1) / units;
  parallel_for(units * t.parts, attend_task, &t);
  t.row_tasks = layer_tasks(rows, rows * dim);
  parallel_for(t.row_tasks, combine_task, &t);
  return QWENRT_OK;
}
