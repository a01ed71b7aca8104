// The C ABI of the quantised linears: lays out the activations and shares the rows between the threads.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "abi/dispatch.h"
#include "linear/integer_linear.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

constexpr int64_t kTokensAtOnce = 32;      // bounds the scratch memory; weights are read again for each such chunk
constexpr float kLargestGroup = 6e35f;     // of a group's |x|: times 2 * 2^8, for code and zero, it still is finite

Scratch scratch;

// One token's activations into its lane of a tile; false where a group's are not finite or too large to sum.
template <int BITS>
bool lay_out_token(const QwenrtQuantMatrix& w, const float* x, float* out, float* sums, int64_t tile) {
  constexpr int PER_WORD = 32 / BITS;
  float place[PER_WORD];
  for (int j = 0; j < PER_WORD; ++j) place[j] = j == PER_WORD - 1 ? 1.0f : 1.0f / float(int64_t(1) << (BITS * j));
  for (int64_t g = 0; g < w.groups; ++g, sums += tile) {
    const int64_t first = g * w.group_size;
    const int64_t inputs = w.in_features - first < w.group_size ? w.in_features - first : w.group_size;
    float part[PER_WORD] = {}, size[PER_WORD] = {};
    int64_t i = 0;
    for (; i + PER_WORD <= inputs; i += PER_WORD, out += PER_WORD * tile)
      for (int j = 0; j < PER_WORD; ++j) {
        const float value = w.perm ? x[w.perm[first + i + j]] : x[first + i + j];
        out[j * tile] = value * place[j];
        part[j] += value;
        size[j] += fabsf(value);
      }
    for (; i < w.words_per_group * PER_WORD; ++i, out += tile) {
      const float value = i >= inputs ? 0.0f : (w.perm ? x[w.perm[first + i]] : x[first + i]);
      *out = value * place[i % PER_WORD];
      part[i % PER_WORD] += value;
      size[i % PER_WORD] += fabsf(value);
    }
    float sum = 0, total = 0;
    for (int j = 0; j < PER_WORD; ++j) sum += part[j], total += size[j];
    if (!(total <= kLargestGroup)) return false;  // NaN is not either
    *sums = sum;
  }
  return true;
}

struct QuantTask {
  const QwenrtQuantMatrix* w;
  QuantInput in;
  float* y;
  Shares shares;  // of row blocks
  const Kernels* kernels;
};

void run_quant_task(void* context, int64_t i) {
  const QuantTask& t = *static_cast<const QuantTask*>(context);
  t.kernels->quant_rows(*t.w, t.in, t.y, t.shares.begin(i), t.shares.begin(i + 1));
}

int quant_linear_chunk(const QwenrtHandle* with, const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens) {
  const int64_t per_word = 32 / w.bits;
  QuantInput in;
  in.tokens = tokens;
  in.tile = tokens >= 3 ? 4 : tokens;
  in.tiles = (tokens + in.tile - 1) / in.tile;
  in.padded = w.groups * w.words_per_group * per_word;
  const int64_t x_floats = in.tiles * in.tile * in.padded, sum_floats = in.tiles * in.tile * w.groups;
  float* memory = reinterpret_cast<float*>(scratch.room((x_floats + sum_floats) * int64_t(sizeof(float))));
  if (!memory) return QWENRT_NO_MEMORY;
  if (in.tiles * in.tile != tokens) memset(memory, 0, size_t(x_floats + sum_floats) * sizeof(float));
  float* sums = memory + x_floats;
  for (int64_t t = 0; t < tokens; ++t) {
    float* token_x = memory + (t / in.tile) * in.tile * in.padded + t % in.tile;
    float* token_sums = sums + (t / in.tile) * in.tile * w.groups + t % in.tile;
    const auto lay_out = w.bits == 4 ? lay_out_token<4> : lay_out_token<8>;
    if (!lay_out(w, x + t * w.in_features, token_x, token_sums, in.tile)) return QWENRT_NOT_FINITE;
  }
  in.x = memory;
  in.sums = sums;
  const int64_t blocks = (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK;
  QuantTask task{&w, in, y, shares_of(blocks, w.out_features * w.in_features * tokens), &linear_kernels(*with)};
  parallel_for(task.shares.count, run_quant_task, &task);
  return QWENRT_OK;
}

struct ReadTask {
  const uint64_t* memory;
  int64_t words, tasks;
  std::atomic<uint64_t> sum;
};

// Two distant streams a task: one alone does not keep enough lines in flight to saturate the memory.
void run_read_task(void* context, int64_t i) {
  ReadTask& t = *static_cast<ReadTask*>(context);
  const int64_t first = t.words * i / t.tasks, last = t.words * (i + 1) / t.tasks, half = (last - first) / 2;
  const uint64_t *a = t.memory + first, *b = a + half;
  uint64_t sums[8] = {};
  int64_t j = 0;
  for (; j + 4 <= half; j += 4)
    for (int k = 0; k < 4; ++k) {
      sums[k] += a[j + k];
      sums[4 + k] += b[j + k];
    }
  for (; j < half; ++j) sums[0] += a[j] + b[j];
  for (const uint64_t* rest = b + half; rest < t.memory + last; ++rest) sums[0] += *rest;
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  t.sum += sum;
}

}  // namespace

int qwenrt_abi(void) { return QWENRT_ABI; }

int qwenrt_quant_linear(const QwenrtHandle* with, const QwenrtQuantMatrix* w, const float* x, float* y, int64_t tokens,
                        const QwenrtActivations* activations) {
  if (w->bits != 4 && w->bits != 8) return QWENRT_BAD_ARGUMENT;
  if (activations->kind < QWENRT_EXACT || activations->kind > QWENRT_INT8) return QWENRT_BAD_ARGUMENT;
  const bool exact = activations->kind == QWENRT_EXACT;
  const int64_t most = exact ? kTokensAtOnce : kIntegerTokens;
  PoolLock lock(with->threads);
  for (int64_t t = 0; t < tokens; t += most) {
    const int64_t chunk = tokens - t < most ? tokens - t : most;
    const float* in = x + t * w->in_features;
    float* out = y + t * w->out_features;
    const int status = exact ? quant_linear_chunk(with, *w, in, out, chunk)
                             : integer_linear_chunk(*w, in, out, chunk, *activations, linear_kernels(*with));
    if (status != QWENRT_OK) return status;
  }
  return QWENRT_OK;
}

uint64_t qwenrt_read(const QwenrtHandle* with, const uint64_t* memory, int64_t words) {
  PoolLock lock(with->threads);
  ReadTask task{memory, words, pool_threads() * kTasksPerThread, {0}};
  parallel_for(task.tasks, run_read_task, &task);
  return task.sum;
}
