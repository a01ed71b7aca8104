// Rounds activations, lays them out as IntegerInput says and shares the rows between the threads.
#include "integer_linear.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "thread_pool.h"

namespace {

// Grows and is kept: one buffer for all calls, used under PoolLock.
char* scratch(int64_t bytes) {
  static char* memory = nullptr;
  static int64_t size = 0;
  if (bytes > size) {
    free(memory);
    memory = static_cast<char*>(malloc(size_t(bytes)));
    size = memory ? bytes : 0;
  }
  return memory;
}

struct LayOutTask {
  const QwenrtQuantMatrix* w;
  const Kernels* kernels;
  const float* x;
  int32_t* out;
  float* scales;
  int32_t* sums;
  IntegerInput in;
  std::atomic<int> status;
};

// One block's rounded activations to its token's lane of a tile.
template <int PER_WORD, int LANES>
void place_block(const int32_t* q, int64_t words, int32_t* out, int64_t tile) {
  constexpr int PLACES = PER_WORD / LANES;
  constexpr uint32_t mask = LANES == 4 ? 0xff : 0xffff;
  for (int64_t i = 0; i < words; ++i, q += PER_WORD, out += PLACES * tile)
    for (int p = 0; p < PLACES; ++p) {
      uint32_t lanes = 0;
      for (int l = 0; l < LANES; ++l) lanes |= (uint32_t(q[p + l * PLACES]) & mask) << (32 / LANES * l);
      out[p * tile] = int32_t(lanes);
    }
}

void lay_out_token(void* context, int64_t token) {
  LayOutTask& task = *static_cast<LayOutTask*>(context);
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const float* x = task.x + token * w.in_features;
  const int64_t per_word = 32 / w.bits, places = in.bytes ? 2 : per_word / 2;
  const int64_t blocks = w.groups * in.blocks_per_group, tile = token / in.tile, lane = token % in.tile;
  int32_t* out = task.out + tile * w.groups * w.words_per_group * places * in.tile + lane;
  float values[kBlockInputs];
  int32_t q[kBlockInputs];
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t skipped = b % in.blocks_per_group * in.words_per_block, rest = w.words_per_group - skipped;
    const int64_t words = rest < in.words_per_block ? rest : in.words_per_block;
    const int64_t first = b / in.blocks_per_group * w.group_size + skipped * per_word;
    const int64_t end = (b / in.blocks_per_group + 1) * w.group_size;
    int64_t inputs = (end < w.in_features ? end : w.in_features) - first;
    if (inputs > words * per_word) inputs = words * per_word;
    const int64_t padded = (words * per_word + 7) / 8 * 8;
    const float* source = x + first;
    if (w.perm || inputs < padded) {
      for (int64_t i = 0; i < padded; ++i)
        values[i] = i >= inputs ? 0.0f : (w.perm ? x[w.perm[first + i]] : x[first + i]);
      source = values;
    }
    const int64_t at = (tile * blocks + b) * in.tile + lane;
    if (!task.kernels->quantize_block(source, padded, in.bytes ? 127.0f : 32767.0f, q, &task.scales[at],
                                      &task.sums[at])) {
      task.status.store(QWENRT_NOT_FINITE);
      return;
    }
    if (w.bits == 8) place_block<4, 2>(q, words, out, in.tile);
    else if (in.bytes) place_block<8, 4>(q, words, out, in.tile);
    else place_block<8, 2>(q, words, out, in.tile);
    out += words * places * in.tile;
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

int integer_linear_chunk(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens, int bytes,
                         const Kernels& kernels) {
  IntegerInput in{};
  in.bytes = bytes && w.bits == 4;  // int8 beside int8 would add more error than the weights' own
  in.tokens = tokens;
  in.tile = tokens >= 3 ? 4 : tokens;
  in.tiles = (tokens + in.tile - 1) / in.tile;
  in.words_per_block = kBlockInputs * w.bits / 32;
  if (in.words_per_block > w.words_per_group) in.words_per_block = w.words_per_group;
  in.blocks_per_group = (w.words_per_group + in.words_per_block - 1) / in.words_per_block;
  const int64_t lanes = in.tiles * in.tile, places = in.bytes ? 2 : 16 / w.bits;
  const int64_t xs = lanes * w.groups * w.words_per_group * places, blocks = lanes * w.groups * in.blocks_per_group;
  const int64_t bytes_needed = (xs + 2 * blocks) * 4;
  char* memory = scratch(bytes_needed);
  if (!memory) return QWENRT_NO_MEMORY;
  if (lanes != tokens) memset(memory, 0, size_t(bytes_needed));
  int32_t* out = reinterpret_cast<int32_t*>(memory);
  float* scales = reinterpret_cast<float*>(memory) + xs;
  in.x = out, in.scales = scales, in.sums = out + xs + blocks;
  LayOutTask lay_out{&w, &kernels, x, out, scales, out + xs + blocks, in, {QWENRT_OK}};
  if (tokens < 8)
    for (int64_t t = 0; t < tokens; ++t) lay_out_token(&lay_out, t);
  else parallel_for(tokens, lay_out_token, &lay_out);
  if (lay_out.status.load() != QWENRT_OK) return lay_out.status.load();
  RowsTask task{&w, &kernels, &in, y, 0, (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK, 1};
  task.pairs = (task.blocks + 1) / 2;
  task.tasks = task_count(task.blocks, w.out_features * w.in_features * tokens);
  parallel_for(task.tasks, run_rows_task, &task);
  return QWENRT_OK;
}
