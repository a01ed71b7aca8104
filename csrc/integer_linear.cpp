// Rounds activations, lays them out as IntegerInput says and shares the rows between the threads. Where int16 would make
// nothing of what is in a block beside a massive value, what rounding left is rounded and multiplied as well.
#include "integer_linear.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "integer_places.h"
#include "scratch.h"
#include "thread_pool.h"
#include "uneven.h"

namespace {

Scratch scratch, rest_scratch;
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
  uint8_t* uneven;               // [tokens]: set where a token has an uneven block; NULL: nobody asks
  std::atomic<int> status;
};

// `count` words of one token to its lane of a tile.
void scatter(const int32_t* words, int64_t count, int32_t* out, int64_t tile) {
  for (int64_t i = 0; i < count; ++i) out[i * tile] = words[i];
}

// An uneven block leaves six bits of int16 or fewer to a quarter of its inputs.
constexpr float kMassive = 8;
constexpr float kFar = 512;

// A block of a row and of a token's activations.
struct Block {
  int64_t group, at;      // among the groups and the blocks
  int64_t word, words;    // its first word of a row, and how many it has
  int64_t first, inputs;  // its first input, and how many there are: none past the row's end
};

// f(block) for every block of a row, in order.
template <class Each>
void each_block(const QwenrtQuantMatrix& w, const IntegerInput& in, Each f) {
  const int64_t per_word = 32 / w.bits;
  int64_t at = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t end = std::min((g + 1) * w.group_size, w.in_features);
    for (int64_t skipped = 0; skipped < w.words_per_group; skipped += in.words_per_block, ++at) {
      const int64_t words = std::min(in.words_per_block, w.words_per_group - skipped);
      const int64_t first = g * w.group_size + skipped * per_word;
      const int64_t inputs = std::max(std::min(end - first, words * per_word), int64_t(0));
      f(Block{g, at, g * w.words_per_group + skipped, words, first, inputs});
    }
  }
}

// The inputs that a block is rounded with: its words', and as many more as fill vectors.
int64_t padded_of(const QwenrtQuantMatrix& w, const Block& block) { return (block.words * 32 / w.bits + 7) / 8 * 8; }

// The inputs of a block where they lie, or in `values` where they lie apart or there are fewer than `padded`.
const float* inputs_of(const QwenrtQuantMatrix& w, const float* x, const Block& block, int64_t padded, float* values) {
  if (!w.perm && block.inputs == padded) return x + block.first;
  for (int64_t i = 0; i < padded; ++i)
    values[i] = i >= block.inputs ? 0.0f : (w.perm ? x[w.perm[block.first + i]] : x[block.first + i]);
  return values;
}

// What a narrow block's largest activation is at most, relative to the token's root mean square; in float64.
float narrow_limit(const float* x, int64_t n, float narrowest) {
  const double squares = total_of<double>(x, n, [](double value) { return value * value; });
  return float(double(narrowest) * sqrt(squares / double(n)));
}

// The same, relative to the root mean square outside of uneven blocks.
float even_limit(const QwenrtQuantMatrix& w, const IntegerInput& in, const float* x, float massive, float narrowest) {
  double squares = 0;
  int64_t count = 0;
  each_block(w, in, [&](const Block& block) {
    float values[kPairBlock];
    const int64_t padded = padded_of(w, block);
    const float* source = inputs_of(w, x, block, padded, values);
    if (is_uneven(source, block.inputs, massive, kFar)) return;
    squares += total_of<double>(source, block.inputs, [](double value) { return value * value; });
    count += block.inputs;
  });
  return float(double(narrowest) * sqrt(squares / double(std::max(count, int64_t(1)))));
}

// Rounds the blocks of a token: those with no value above `narrow` to int8, uneven ones to int16. Whether there are any.
bool lay_out_blocks(LayOutTask& task, int64_t token, const float* x, float narrow, float massive) {
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const int64_t places = places_of(w.bits, in.pairs), tile = token / in.tile, lane = token % in.tile;
  const int64_t row = w.groups * w.words_per_group * places, blocks = w.groups * in.blocks_per_group;
  const float outlier = task.how ? task.how->outlier : 0;
  bool some = false;
  each_block(w, in, [&](const Block& block) {
    float values[kPairBlock];
    int32_t low[kPairBlock], high[kPairBlock], sum = 0;
    const int64_t padded = padded_of(w, block), at = tile * blocks + block.at, words = block.words * places;
    const float* source = inputs_of(w, x, block, padded, values);
    float& scale = task.scales[at * in.tile + lane];
    int kind = task.kernels->round_block(source, padded, w.bits, narrow, outlier, low, high, &scale, &sum);
    if (!kind) {
      task.status.store(QWENRT_NOT_FINITE);
      return;
    }
    const float largest = scale * (kind == 1 && w.bits == 4 ? kNarrowLimit : kWideLimit);  // but for the last digits
    if (task.uneven && largest * 1.001f > massive && is_uneven(source, block.inputs, massive, kFar)) {
      some = true;
      kind = task.kernels->round_block(source, padded, w.bits, -1.0f, outlier, low, high, &scale, &sum);
    }
    if (in.apart) {
      const int64_t out = token * in.apart + block.word * places;
      memcpy(task.low + out, low, size_t(words) * 4);
      if (kind == 2) memcpy(task.high + out, high, size_t(words) * 4);
      else if (!in.pairs) memset(task.high + out, 0, size_t(words) * 4);
      task.wide[at * in.tile + lane] = kind == 2;
    } else {
      const int64_t out = (tile * row + block.word * places) * in.tile + lane;
      scatter(low, words, task.low + out, in.tile);
      if (kind == 2) scatter(high, words, task.high + out, in.tile);
      const int mask = 1 << lane;
      task.wide[at] = uint8_t(kind == 2 ? task.wide[at] | mask : task.wide[at] & ~mask);
    }
    float& group_sum = task.sums[(tile * w.groups + block.group) * in.tile + lane];
    group_sum = block.at % in.blocks_per_group ? group_sum + scale * float(sum) : scale * float(sum);
  });
  return some;
}

// Every thread has read the last activations from these lines. Taken back one by one as they are written, they cost more
// than rounding does.
void own(const void* first, int64_t bytes) {
  const char* const lines = static_cast<const char*>(first);
#ifdef QWENRT_X86
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetchw %0" : : "m"(lines[i]));  // older CPUs skip it
#else
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(lines + i, 1);
#endif
}

void own_tile(const LayOutTask& task, int64_t tile) {
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const int64_t words = w.groups * w.words_per_group * places_of(w.bits, in.pairs) * in.tile;
  const int64_t blocks = w.groups * in.blocks_per_group;
  own(task.low + tile * words, words * 4);
  if (!in.pairs && !task.how) own(task.high + tile * words, words * 4);
  own(task.scales + tile * blocks * in.tile, blocks * in.tile * 4);
  own(task.sums + tile * w.groups * in.tile, w.groups * in.tile * 4);
}

void lay_out_token(LayOutTask& task, int64_t token) {
  const int64_t n = task.w->in_features;
  const float* x = task.x + token * n;
  const float massive = task.uneven ? massive_from(x, n, kMassive) : 0;
  if (!lay_out_blocks(task, token, x, task.how ? narrow_limit(x, n, task.how->narrowest) : -1.0f, massive)) return;
  task.uneven[token] = 1;
  if (task.how) lay_out_blocks(task, token, x, even_limit(*task.w, task.in, x, massive, task.how->narrowest), massive);
}

// The tokens of a tile lie between each other: two threads would take the lines of the cache from one another.
void lay_out_tile(void* context, int64_t tile) {
  LayOutTask& task = *static_cast<LayOutTask*>(context);
  const IntegerInput& in = task.in;
  const int64_t first = tile * in.tile, last = std::min(first + in.tile, in.tokens);
  own_tile(task, tile);
  for (int64_t token = first; token < last; ++token) lay_out_token(task, token);
  if (in.tile == 1) return;
  // Upper bytes that a neighbour makes others read must be zeros.
  const int64_t places = places_of(task.w->bits, in.pairs), blocks = task.w->groups * in.blocks_per_group;
  const int64_t row = task.w->groups * task.w->words_per_group * places, all = (1 << in.tile) - 1;
  each_block(*task.w, in, [&](const Block& block) {
    const int64_t wide = task.wide[tile * blocks + block.at];
    int32_t* const high = task.high + (tile * row + block.word * places) * in.tile;
    for (int64_t lane = 0; wide && wide != all && lane < in.tile; ++lane)
      for (int64_t i = 0; !(wide >> lane & 1) && i < block.words * places; ++i) high[i * in.tile + lane] = 0;
  });
}

constexpr int64_t kTokensOfTask = 8;  // by token

void lay_out_tokens(void* context, int64_t i) {
  LayOutTask& task = *static_cast<LayOutTask*>(context);
  const int64_t last = std::min((i + 1) * kTokensOfTask, task.in.tokens);
  for (int64_t token = i * kTokensOfTask; token < last; ++token) lay_out_token(task, token);
}

// What the activations of a chunk are once laid out, less their places.
IntegerInput shape_of(const QwenrtQuantMatrix& w, int64_t tokens, const Kernels& kernels) {
  IntegerInput in{};
  in.pairs = kernels.pairs && w.bits == 8;
  in.tokens = tokens;
  const bool by_token = kernels.by_token_from && tokens >= kernels.by_token_from;
  // A line more than they need: tokens that are a power of two apart would take each other's places in the first cache.
  in.apart = by_token ? (w.groups * w.words_per_group * places_of(w.bits, in.pairs) + 15) / 16 * 16 + 16 : 0;
  if (by_token) in.tile = (tokens + kTokenTile - 1) / kTokenTile * kTokenTile;
  else in.tile = tokens >= 3 ? 4 : tokens;
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
    low = lanes * (in.apart ? in.apart : w.groups * w.words_per_group * places_of(w.bits, in.pairs));
    high = in.pairs ? 0 : low;
    scales = lanes * blocks, sums = lanes * w.groups, wide = (in.apart ? lanes : in.tiles) * blocks;
  }
  int64_t bytes() const { return ((low + high + scales + sums) * 4 + wide + 63) / 64 * 64; }
};

// x in `memory` of Sizes.bytes(), as `in` then says.
int lay_out(const QwenrtQuantMatrix& w, const float* x, const QwenrtActivations* how, const Kernels& kernels,
            char* memory, IntegerInput& in, uint8_t* uneven) {
  const Sizes sizes(w, in);
  int32_t* const low = reinterpret_cast<int32_t*>(memory);
  float* const scales = reinterpret_cast<float*>(low + sizes.low + sizes.high);
  float* const sums = scales + sizes.scales;
  uint8_t* const wide = reinterpret_cast<uint8_t*>(sums + sizes.sums);
  LayOutTask task{&w, &kernels, x, low, low + sizes.low, wide, scales, sums, in, how, uneven, {QWENRT_OK}};
  if (!in.apart && in.tiles * in.tile != in.tokens) memset(memory, 0, size_t(sizes.bytes()));  // lanes that nobody writes
  else memset(wide, 0, size_t(sizes.wide));
  if (in.apart) parallel_for((in.tokens + kTokensOfTask - 1) / kTokensOfTask, lay_out_tokens, &task);
  else if (in.tiles < kTilesWorthWaking)
    for (int64_t tile = 0; tile < in.tiles; ++tile) lay_out_tile(&task, tile);
  else parallel_for(in.tiles, lay_out_tile, &task);
  in.low = task.low, in.high = task.high, in.scales = scales, in.sums = sums, in.wide = wide;
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

// y [tokens][out_features] = W x, rounded as `how` says (NULL: all to int16); marks the tokens with an uneven block.
int multiply(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens, const QwenrtActivations* how,
             const Kernels& kernels, uint8_t* uneven) {
  IntegerInput narrow = shape_of(w, tokens, kernels), wide = narrow;
  const int64_t bytes = Sizes(w, narrow).bytes(), blocks = (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK;
  // int8 beside int8 would add more error than the weights' own
  const bool some = how && how->kind == QWENRT_INT8 && w.bits == 4;
  const int64_t narrow_blocks = !some                                  ? 0
                                : how->narrow_rows >= w.out_features ? blocks
                                                                     : how->narrow_rows / QWENRT_BLOCK;
  const bool both = narrow_blocks > 0 && narrow_blocks < blocks;
  char* memory = scratch.room(both ? 2 * bytes : bytes);
  if (!memory) return QWENRT_NO_MEMORY;
  if (narrow_blocks > 0)
    if (const int status = lay_out(w, x, how, kernels, memory, narrow, uneven)) return status;
  if (narrow_blocks < blocks)
    if (const int status = lay_out(w, x, nullptr, kernels, both ? memory + bytes : memory, wide, uneven)) return status;
  const Shares shares = shares_of((blocks + 1) / 2, w.out_features * w.in_features * tokens);
  RowsTask rows{&w, &kernels, &narrow, &wide, y, narrow_blocks, blocks, shares};
  parallel_for(shares.count, run_rows_task, &rows);
  return QWENRT_OK;
}

// What rounding to int16 leaves of the uneven blocks of x to `rest`, zeros elsewhere. Of a product, float64 loses nothing.
void leave_rest(const QwenrtQuantMatrix& w, const IntegerInput& in, const float* x, float* rest) {
  const float massive = massive_from(x, w.in_features, kMassive);
  std::fill(rest, rest + w.in_features, 0.0f);
  each_block(w, in, [&](const Block& block) {
    float values[kPairBlock];
    const int64_t padded = padded_of(w, block);
    const float* source = inputs_of(w, x, block, padded, values);
    if (!is_uneven(source, block.inputs, massive, kFar)) return;
    const float largest = largest_of(source, padded), scale = largest / kWideLimit, inverse = kWideLimit / largest;
    for (int64_t i = 0; i < block.inputs; ++i) {
      const double rounded = double(scale) * double(nearbyintf(source[i] * inverse));
      rest[w.perm ? w.perm[block.first + i] : block.first + i] = float(double(source[i]) - rounded);
    }
  });
}

// Adds W times that rest to y of the tokens that are marked.
int add_rest(QwenrtQuantMatrix w, const float* x, float* y, int64_t tokens, const Kernels& kernels,
             const uint8_t* uneven) {
  const int64_t count = std::count(uneven, uneven + tokens, 1), columns = w.in_features, rows = w.out_features;
  if (!count) return QWENRT_OK;
  float* const rest = reinterpret_cast<float*>(rest_scratch.room(count * (columns + rows) * int64_t(sizeof(float))));
  if (!rest) return QWENRT_NO_MEMORY;
  float* const more = rest + count * columns;
  const IntegerInput shape = shape_of(w, count, kernels);
  for (int64_t t = 0, i = 0; t < tokens; ++t)
    if (uneven[t]) leave_rest(w, shape, x + t * columns, rest + i++ * columns);
  w.bias = nullptr;  // y has it
  if (const int status = multiply(w, rest, more, count, nullptr, kernels, nullptr)) return status;
  for (int64_t t = 0, i = 0; t < tokens; ++t) {
    if (!uneven[t]) continue;
    for (int64_t n = 0; n < rows; ++n) y[t * rows + n] += more[i * rows + n];
    ++i;
  }
  return QWENRT_OK;
}

}  // namespace

int integer_linear_chunk(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens,
                         const QwenrtActivations& how, const Kernels& kernels) {
  uint8_t uneven[kIntegerTokens] = {};
  if (const int status = multiply(w, x, y, tokens, &how, kernels, uneven)) return status;
  return add_rest(w, x, y, tokens, kernels, uneven);
}
