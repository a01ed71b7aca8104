// Rounds activations, lays them out as IntegerInput says and shares the rows between the threads.
#include "integer_linear.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "scratch.h"
#include "thread_pool.h"

namespace {

Scratch scratch;

struct LayOutTask {
  const QwenrtQuantMatrix* w;
  const Kernels* kernels;
  const float* x;
  int32_t* low;
  int32_t* high;
  std::atomic<uint8_t>* wide;
  float* scales;
  float* sums;
  IntegerInput in;
  bool narrow;
  std::atomic<int> status;
};

// `count` words of one token to its lane of a tile.
void scatter(const int32_t* words, int64_t count, int32_t* out, int64_t tile) {
  for (int64_t i = 0; i < count; ++i) out[i * tile] = words[i];
}

// What a narrow block's largest activation is at most; in float64 and in order, so that it is the same everywhere.
float narrow_limit(const float* x, int64_t n) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += double(x[i]) * double(x[i]);
  return float(kNarrowest * sqrt(squares / double(n)));
}

void lay_out_token(void* context, int64_t token) {
  LayOutTask& task = *static_cast<LayOutTask*>(context);
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const float* x = task.x + token * w.in_features;
  const int64_t per_word = 32 / w.bits, places = places_of(w.bits, in.pairs), tile = token / in.tile, lane = token % in.tile;
  const float narrow = task.narrow ? narrow_limit(x, w.in_features) : -1.0f;
  int64_t out = tile * w.groups * w.words_per_group * places * in.tile + lane;
  float values[kPairBlock];
  for (int64_t g = 0; g < w.groups; ++g) {
    float group_sum = 0;
    for (int64_t part = 0; part < in.blocks_per_group; ++part) {
      const int64_t skipped = part * in.words_per_block, rest = w.words_per_group - skipped;
      const int64_t words = rest < in.words_per_block ? rest : in.words_per_block, first = g * w.group_size + skipped * per_word;
      const int64_t end = (g + 1) * w.group_size < w.in_features ? (g + 1) * w.group_size : w.in_features;
      const int64_t inputs = end - first < words * per_word ? end - first : words * per_word;
      const int64_t padded = (words * per_word + 7) / 8 * 8, at = tile * w.groups * in.blocks_per_group + g * in.blocks_per_group + part;
      const float* source = x + first;
      if (w.perm || inputs < padded) {
        for (int64_t i = 0; i < padded; ++i)
          values[i] = i >= inputs ? 0.0f : (w.perm ? x[w.perm[first + i]] : x[first + i]);
        source = values;
      }
      int32_t low[kPairBlock], high[kPairBlock], sum = 0;
      float& scale = task.scales[at * in.tile + lane];
      const int kind = task.kernels->round_block(source, padded, w.bits, narrow, low, high, &scale, &sum);
      if (!kind) {
        task.status.store(QWENRT_NOT_FINITE);
        return;
      }
      scatter(low, words * places, task.low + out, in.tile);
      if (kind == 2) {
        scatter(high, words * places, task.high + out, in.tile);
        task.wide[at].store(1, std::memory_order_relaxed);
      }
      group_sum += scale * float(sum);
      out += words * places * in.tile;
    }
    task.sums[(tile * w.groups + g) * in.tile + lane] = group_sum;
  }
}

struct RowsTask {
  const QwenrtQuantMatrix* w;
  const Kernels* kernels;
  const IntegerInput* in;
  float* y;
  int64_t pairs, blocks, tasks;
};

void run_rows_task(void* context, int64_t i) {
  const RowsTask& t = *static_cast<const RowsTask*>(context);
  const int64_t begin = t.pairs * i / t.tasks * 2, end = t.pairs * (i + 1) / t.tasks * 2;
  t.kernels->integer_rows(*t.w, *t.in, t.y, begin, end < t.blocks ? end : t.blocks);
}

}  // namespace

int integer_linear_chunk(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens, int narrow,
                         const Kernels& kernels) {
  IntegerInput in{};
  in.pairs = kernels.pairs && w.bits == 8;
  in.tokens = tokens;
  in.tile = tokens >= 3 ? 4 : tokens;
  in.tiles = (tokens + in.tile - 1) / in.tile;
  in.words_per_block = (w.bits == 4 ? kByteBlock : kPairBlock) * w.bits / 32;
  if (in.words_per_block > w.words_per_group) in.words_per_block = w.words_per_group;
  in.blocks_per_group = (w.words_per_group + in.words_per_block - 1) / in.words_per_block;
  const int64_t lanes = in.tiles * in.tile, places = places_of(w.bits, in.pairs), blocks = w.groups * in.blocks_per_group;
  const int64_t xs = lanes * w.groups * w.words_per_group * places, high = in.pairs ? 0 : xs;
  const int64_t bytes = (xs + high + lanes * (blocks + w.groups)) * 4 + in.tiles * blocks;
  char* memory = scratch.room(bytes);
  if (!memory) return QWENRT_NO_MEMORY;
  LayOutTask task{&w, &kernels, x, reinterpret_cast<int32_t*>(memory), nullptr, nullptr, nullptr, nullptr, in,
                  narrow && w.bits == 4,  // int8 beside int8 would add more error than the weights' own
                  {QWENRT_OK}};
  task.high = task.low + xs;
  task.scales = reinterpret_cast<float*>(task.high + high);
  task.sums = task.scales + lanes * blocks;
  task.wide = reinterpret_cast<std::atomic<uint8_t>*>(task.sums + lanes * w.groups);
  // Unwritten lanes and upper bytes that a neighbour in the tile makes others read must be zeros.
  if (lanes != tokens) memset(memory, 0, size_t(bytes));
  else if (task.narrow) memset(static_cast<void*>(task.high), 0, size_t(high) * 4);
  if (lanes == tokens) memset(static_cast<void*>(task.wide), 0, size_t(in.tiles * blocks));
  if (tokens < 8)
    for (int64_t t = 0; t < tokens; ++t) lay_out_token(&task, t);
  else parallel_for(tokens, lay_out_token, &task);
  if (task.status.load() != QWENRT_OK) return task.status.load();
  in.low = task.low, in.high = task.high, in.scales = task.scales, in.sums = task.sums;
  in.wide = reinterpret_cast<const uint8_t*>(task.wide);
  RowsTask rows{&w, &kernels, &in, y, 0, (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK, 1};
  rows.pairs = (rows.blocks + 1) / 2;
  rows.tasks = task_count(rows.blocks, w.out_features * w.in_features * tokens);
  parallel_for(rows.tasks, run_rows_task, &rows);
  return QWENRT_OK;
}
