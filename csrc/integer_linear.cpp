// Rounds activations, lays them out as IntegerInput says and shares the rows between the threads.
#include "integer_linear.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "scratch.h"
#include "thread_pool.h"

namespace {

Scratch scratch;
constexpr int64_t kTilesWorthWaking = 3;

struct LayOutTask {
  const QwenrtQuantMatrix* w;
  const Kernels* kernels;
  const float* x;
  int32_t* low;
  int32_t* high;
  uint8_t* wide;
  float* scales;
  float* sums;
  IntegerInput in;
  const QwenrtActivations* how;  // NULL: all blocks are wide
  std::atomic<int> status;
};

// `count` words of one token to its lane of a tile.
void scatter(const int32_t* words, int64_t count, int32_t* out, int64_t tile) {
  for (int64_t i = 0; i < count; ++i) out[i * tile] = words[i];
}

// What a narrow block's largest activation is at most; in float64 and in one order, so that it is the same everywhere.
float narrow_limit(const float* x, int64_t n, float narrowest) {
  double squares[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) squares[j] += double(x[i + j]) * double(x[i + j]);
  for (; i < n; ++i) squares[i % 8] += double(x[i]) * double(x[i]);
  for (int j = 1; j < 8; ++j) squares[0] += squares[j];
  return float(double(narrowest) * sqrt(squares[0] / double(n)));
}

void lay_out_token(LayOutTask& task, int64_t token) {
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const float* x = task.x + token * w.in_features;
  const int64_t per_word = 32 / w.bits, places = places_of(w.bits, in.pairs), tile = token / in.tile, lane = token % in.tile;
  const float narrow = task.how ? narrow_limit(x, w.in_features, task.how->narrowest) : -1.0f;
  const float outlier = task.how ? task.how->outlier : 0;
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
      const int kind = task.kernels->round_block(source, padded, w.bits, narrow, outlier, low, high, &scale, &sum);
      if (!kind) {
        task.status.store(QWENRT_NOT_FINITE);
        return;
      }
      scatter(low, words * places, task.low + out, in.tile);
      if (kind == 2) {
        scatter(high, words * places, task.high + out, in.tile);
        task.wide[at] = uint8_t(task.wide[at] | 1 << lane);
      }
      group_sum += scale * float(sum);
      out += words * places * in.tile;
    }
    task.sums[(tile * w.groups + g) * in.tile + lane] = group_sum;
  }
}

// The tokens of a tile lie between each other: two threads would take the lines of the cache from one another.
void lay_out_tile(void* context, int64_t tile) {
  LayOutTask& task = *static_cast<LayOutTask*>(context);
  const int64_t first = tile * task.in.tile, last = std::min(first + task.in.tile, task.in.tokens);
  for (int64_t token = first; token < last; ++token) lay_out_token(task, token);
}

// What the activations of a chunk are once laid out, less their places.
IntegerInput shape_of(const QwenrtQuantMatrix& w, int64_t tokens, const Kernels& kernels) {
  IntegerInput in{};
  in.pairs = kernels.pairs && w.bits == 8;
  in.tokens = tokens;
  in.tile = tokens >= 3 ? 4 : tokens;
  in.tiles = (tokens + in.tile - 1) / in.tile;
  in.words_per_block = (w.bits == 4 ? kByteBlock : kPairBlock) * w.bits / 32;
  if (in.words_per_block > w.words_per_group) in.words_per_block = w.words_per_group;
  in.blocks_per_group = (w.words_per_group + in.words_per_block - 1) / in.words_per_block;
  return in;
}

// How many of what an IntegerInput points at.
struct Sizes {
  int64_t low, high, scales, sums, wide;

  Sizes(const QwenrtQuantMatrix& w, const IntegerInput& in) {
    const int64_t lanes = in.tiles * in.tile, blocks = w.groups * in.blocks_per_group;
    low = lanes * w.groups * w.words_per_group * places_of(w.bits, in.pairs);
    high = in.pairs ? 0 : low;
    scales = lanes * blocks, sums = lanes * w.groups, wide = in.tiles * blocks;
  }
  int64_t bytes() const { return ((low + high + scales + sums) * 4 + wide + 63) / 64 * 64; }
};

// x in `memory` of Sizes.bytes(), as `in` then says.
int lay_out(const QwenrtQuantMatrix& w, const float* x, const QwenrtActivations* how, const Kernels& kernels, char* memory,
            IntegerInput& in) {
  const Sizes sizes(w, in);
  LayOutTask task{&w, &kernels, x, reinterpret_cast<int32_t*>(memory), nullptr, nullptr, nullptr, nullptr, in, how, {QWENRT_OK}};
  task.high = task.low + sizes.low;
  task.scales = reinterpret_cast<float*>(task.high + sizes.high);
  task.sums = task.scales + sizes.scales;
  task.wide = reinterpret_cast<uint8_t*>(task.sums + sizes.sums);
  // Unwritten lanes and upper bytes that a neighbour in the tile makes others read must be zeros.
  if (in.tiles * in.tile != in.tokens) memset(memory, 0, size_t(sizes.bytes()));
  else if (how) memset(static_cast<void*>(task.high), 0, size_t(sizes.high) * 4);
  memset(static_cast<void*>(task.wide), 0, size_t(sizes.wide));
  if (in.tiles < kTilesWorthWaking)
    for (int64_t tile = 0; tile < in.tiles; ++tile) lay_out_tile(&task, tile);
  else parallel_for(in.tiles, lay_out_tile, &task);
  in.low = task.low, in.high = task.high, in.scales = task.scales, in.sums = task.sums;
  in.wide = task.wide;
  return task.status.load();
}

struct RowsTask {
  const QwenrtQuantMatrix* w;
  const Kernels* kernels;
  const IntegerInput *narrow, *wide;
  float* y;
  int64_t narrow_blocks, blocks;
  Shares shares;  // of pairs of row blocks
};

void run_rows_task(void* context, int64_t i) {
  const RowsTask& t = *static_cast<const RowsTask*>(context);
  const int64_t begin = t.shares.begin(i) * 2, end = std::min(t.shares.begin(i + 1) * 2, t.blocks);
  const int64_t middle = std::min(std::max(begin, t.narrow_blocks), end);
  if (begin < middle) t.kernels->integer_rows(*t.w, *t.narrow, t.y, begin, middle);
  if (middle < end) t.kernels->integer_rows(*t.w, *t.wide, t.y, middle, end);
}

}  // namespace

int integer_linear_chunk(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens,
                         const QwenrtActivations& how, const Kernels& kernels) {
  IntegerInput narrow = shape_of(w, tokens, kernels), wide = narrow;
  const int64_t bytes = Sizes(w, narrow).bytes(), blocks = (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK;
  // int8 beside int8 would add more error than the weights' own
  const bool some = how.kind == QWENRT_INT8 && w.bits == 4;
  const int64_t whole = how.narrow_rows / QWENRT_BLOCK;
  const int64_t narrow_blocks = !some ? 0 : how.narrow_rows >= w.out_features ? blocks : whole;
  char* memory = scratch.room(2 * bytes);
  if (!memory) return QWENRT_NO_MEMORY;
  if (narrow_blocks > 0)
    if (const int status = lay_out(w, x, &how, kernels, memory, narrow)) return status;
  if (narrow_blocks < blocks)
    if (const int status = lay_out(w, x, nullptr, kernels, memory + bytes, wide)) return status;
  const Shares shares = shares_of((blocks + 1) / 2, w.out_features * w.in_features * tokens);
  RowsTask rows{&w, &kernels, &narrow, &wide, y, narrow_blocks, blocks, shares};
  parallel_for(shares.count, run_rows_task, &rows);
  return QWENRT_OK;
}
