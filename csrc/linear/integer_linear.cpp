// Rounds activations, lays them out as IntegerInput says and shares the rows between the threads. Where int16 would
// make nothing of what is in a block beside an outlier, what rounding left, the residual, is rounded and multiplied as
// well.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "linear/integer_places.h"
#include "linear/linears.h"
#include "linear/residual.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

Scratch scratch, residual_scratch;
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
  uint8_t* needs_residual;       // [tokens]: set where a block of a token does; NULL: nobody asks
  std::atomic<int> status;
};

// `count` words of one token to its lane of a tile.
void scatter(const int32_t* words, int64_t count, int32_t* out, int64_t tile) {
  for (int64_t i = 0; i < count; ++i) out[i * tile] = words[i];
}

// A block that needs a residual leaves six bits of int16 or fewer to a quarter of its inputs.
constexpr float kOutlier = 8;
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

// The inputs of a block where they lie, or in `values` where these are not neighbours or fewer than `padded`.
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

// The same, relative to the root mean square outside of blocks that need a residual.
float narrow_limit_without_outliers(const QwenrtQuantMatrix& w, const IntegerInput& in, const float* x, float outlier,
                                    float narrowest) {
  double squares = 0;
  int64_t count = 0;
  each_block(w, in, [&](const Block& block) {
    float values[kPairBlock];
    const int64_t padded = padded_of(w, block);
    const float* source = inputs_of(w, x, block, padded, values);
    if (needs_residual(source, block.inputs, outlier, kFar)) return;
    squares += total_of<double>(source, block.inputs, [](double value) { return value * value; });
    count += block.inputs;
  });
  return float(double(narrowest) * sqrt(squares / double(std::max(count, int64_t(1)))));
}

// Rounds the blocks of a token: those with no value above `narrow` to int8, those that need a residual to int16.
// Whether there are any of the latter.
bool lay_out_blocks(LayOutTask& task, int64_t token, const float* x, float narrow, float outlier) {
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const int64_t places = places_of(w.bits, in.pairs), tile = token / in.tile, lane = token % in.tile;
  const int64_t row = w.groups * w.words_per_group * places, blocks = w.groups * in.blocks_per_group;
  const float to_mean = task.how ? task.how->outlier : 0;
  bool some = false;
  RoundedBlock rounded;
  each_block(w, in, [&](const Block& block) {
    float values[kPairBlock];
    const int64_t padded = padded_of(w, block), at = tile * blocks + block.at, words = block.words * places;
    const float* source = inputs_of(w, x, block, padded, values);
    BlockKind kind = task.kernels->round_block(source, padded, w.bits, {narrow, to_mean}, rounded);
    if (kind == BlockKind::kNotFinite) {
      task.status.store(QWENRT_NOT_FINITE);
      return;
    }
    // But for the last digits:
    const float largest = rounded.scale * (kind == BlockKind::kNarrow && w.bits == 4 ? kNarrowLimit : kWideLimit);
    if (task.needs_residual && largest * 1.001f > outlier && needs_residual(source, block.inputs, outlier, kFar)) {
      some = true;
      kind = task.kernels->round_block(source, padded, w.bits, {-1.0f, to_mean}, rounded);
    }
    const bool wide = kind == BlockKind::kWide;
    if (in.layout == Layout::kByToken) {
      const int64_t out = token * in.token_stride + block.word * places;
      memcpy(task.low + out, rounded.low, size_t(words) * 4);
      if (wide) memcpy(task.high + out, rounded.high, size_t(words) * 4);
      else if (!in.pairs) memset(task.high + out, 0, size_t(words) * 4);
      task.wide[at * in.tile + lane] = wide;
    } else {
      const int64_t out = (tile * row + block.word * places) * in.tile + lane;
      scatter(rounded.low, words, task.low + out, in.tile);
      if (wide) scatter(rounded.high, words, task.high + out, in.tile);
      const int mask = 1 << lane;
      task.wide[at] = uint8_t(wide ? task.wide[at] | mask : task.wide[at] & ~mask);
    }
    task.scales[at * in.tile + lane] = rounded.scale;
    const float sum = rounded.scale * float(rounded.sum);
    float& group_sum = task.sums[(tile * w.groups + block.group) * in.tile + lane];
    group_sum = block.at % in.blocks_per_group ? group_sum + sum : sum;
  });
  return some;
}

// Every thread has read the last activations from these lines. Taken back one by one as they are written, they cost
// more than rounding does.
void prefetch_for_write(const void* first, int64_t bytes) {
  const char* const lines = static_cast<const char*>(first);
#ifdef QWENRT_X86
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetchw %0" : : "m"(lines[i]));  // older CPUs skip it
#else
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(lines + i, 1);
#endif
}

void prefetch_tile_for_write(const LayOutTask& task, int64_t tile) {
  const QwenrtQuantMatrix& w = *task.w;
  const IntegerInput& in = task.in;
  const int64_t words = w.groups * w.words_per_group * places_of(w.bits, in.pairs) * in.tile;
  const int64_t blocks = w.groups * in.blocks_per_group;
  prefetch_for_write(task.low + tile * words, words * 4);
  if (!in.pairs && !task.how) prefetch_for_write(task.high + tile * words, words * 4);
  prefetch_for_write(task.scales + tile * blocks * in.tile, blocks * in.tile * 4);
  prefetch_for_write(task.sums + tile * w.groups * in.tile, w.groups * in.tile * 4);
}

void lay_out_token(LayOutTask& task, int64_t token) {
  const int64_t n = task.w->in_features;
  const float* x = task.x + token * n;
  const float outlier = task.needs_residual ? outlier_from(x, n, kOutlier) : 0;
  const float narrow = task.how ? narrow_limit(x, n, task.how->narrowest) : -1.0f;
  if (!lay_out_blocks(task, token, x, narrow, outlier)) return;
  task.needs_residual[token] = 1;
  if (!task.how) return;
  const float others = narrow_limit_without_outliers(*task.w, task.in, x, outlier, task.how->narrowest);
  lay_out_blocks(task, token, x, others, outlier);
}

// The tokens of a tile lie between each other: two threads would take the lines of the cache from one another.
void lay_out_tile(void* context, int64_t tile) {
  LayOutTask& task = *static_cast<LayOutTask*>(context);
  const IntegerInput& in = task.in;
  const int64_t first = tile * in.tile, last = std::min(first + in.tile, in.tokens);
  prefetch_tile_for_write(task, tile);
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
  in.layout = by_token ? Layout::kByToken : Layout::kTiles;
  // A line more than they need: tokens that are a power of two apart would take each other's places in the first cache.
  in.token_stride = by_token ? (w.groups * w.words_per_group * places_of(w.bits, in.pairs) + 15) / 16 * 16 + 16 : 0;
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
    const bool by_token = in.layout == Layout::kByToken;
    low = lanes * (by_token ? in.token_stride : w.groups * w.words_per_group * places_of(w.bits, in.pairs));
    high = in.pairs ? 0 : low;
    scales = lanes * blocks, sums = lanes * w.groups, wide = (by_token ? lanes : in.tiles) * blocks;
  }
};

// Room for activations, laid out once or, where some rows want them otherwise, twice.
struct Room {
  Sizes sizes;
  int32_t *low, *high;
  float *scales, *sums;
  uint8_t* wide;

  bool make(int64_t times) {
    return scratch.room(array(low, times * sizes.low), array(high, times * sizes.high),
                        array(scales, times * sizes.scales), array(sums, times * sizes.sums),
                        array(wide, times * sizes.wide));
  }
  Room second() const {
    return {sizes, low + sizes.low, high + sizes.high, scales + sizes.scales, sums + sizes.sums, wide + sizes.wide};
  }
};

// x in `room`, as `in` then says.
int lay_out(const QwenrtQuantMatrix& w, const float* x, const QwenrtActivations* how, const Kernels& kernels,
            const Room& room, IntegerInput& in, uint8_t* needs_residual) {
  LayOutTask task{&w,          &kernels,  x,  room.low, room.high,      room.wide,
                  room.scales, room.sums, in, how,      needs_residual, {QWENRT_OK}};
  const bool by_token = in.layout == Layout::kByToken;
  memset(room.wide, 0, size_t(room.sizes.wide));
  if (!by_token && in.tiles * in.tile != in.tokens) {  // lanes that nobody writes
    memset(room.low, 0, size_t(room.sizes.low) * sizeof *room.low);
    if (room.sizes.high) memset(room.high, 0, size_t(room.sizes.high) * sizeof *room.high);
    memset(room.scales, 0, size_t(room.sizes.scales) * sizeof *room.scales);
    memset(room.sums, 0, size_t(room.sizes.sums) * sizeof *room.sums);
  }
  if (by_token) parallel_for((in.tokens + kTokensOfTask - 1) / kTokensOfTask, lay_out_tokens, &task);
  else if (in.tiles < kTilesWorthWaking)
    for (int64_t tile = 0; tile < in.tiles; ++tile) lay_out_tile(&task, tile);
  else parallel_for(in.tiles, lay_out_tile, &task);
  in.low = task.low, in.high = task.high, in.scales = task.scales, in.sums = task.sums, in.wide = task.wide;
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

// y [tokens][out_features] = W x, rounded as `how` says (NULL: all to int16); marks the tokens that need a residual.
int multiply(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens, const QwenrtActivations* how,
             const Kernels& kernels, uint8_t* needs_residual) {
  IntegerInput narrow = shape_of(w, tokens, kernels), wide = narrow;
  const int64_t blocks = (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK;
  // int8 beside int8 would add more error than the weights' own
  const bool some = how && how->kind == QWENRT_INT8 && w.bits == 4;
  const int64_t narrow_blocks = !some                                  ? 0
                                : how->narrow_rows >= w.out_features ? blocks
                                                                     : how->narrow_rows / QWENRT_BLOCK;
  const bool both = narrow_blocks > 0 && narrow_blocks < blocks;
  Room room{Sizes(w, narrow), nullptr, nullptr, nullptr, nullptr, nullptr};
  if (!room.make(both ? 2 : 1)) return QWENRT_NO_MEMORY;
  if (narrow_blocks > 0)
    if (const int status = lay_out(w, x, how, kernels, room, narrow, needs_residual)) return status;
  if (narrow_blocks < blocks)
    if (const int status = lay_out(w, x, nullptr, kernels, both ? room.second() : room, wide, needs_residual))
      return status;
  const Shares shares = shares_of((blocks + 1) / 2, w.out_features * w.in_features * tokens);
  RowsTask rows{&w, &kernels, &narrow, &wide, y, narrow_blocks, blocks, shares};
  parallel_for(shares.count, run_rows_task, &rows);
  return QWENRT_OK;
}

// What rounding to int16 leaves of the blocks of x that need a residual, zeros elsewhere. Of a product, float64 loses
// nothing.
void residual_of(const QwenrtQuantMatrix& w, const IntegerInput& in, const float* x, float* residual) {
  const float outlier = outlier_from(x, w.in_features, kOutlier);
  std::fill(residual, residual + w.in_features, 0.0f);
  each_block(w, in, [&](const Block& block) {
    float values[kPairBlock];
    const int64_t padded = padded_of(w, block);
    const float* source = inputs_of(w, x, block, padded, values);
    if (!needs_residual(source, block.inputs, outlier, kFar)) return;
    const float largest = largest_of(source, padded), scale = largest / kWideLimit, inverse = kWideLimit / largest;
    for (int64_t i = 0; i < block.inputs; ++i) {
      const double rounded = double(scale) * double(nearbyintf(source[i] * inverse));
      residual[w.perm ? w.perm[block.first + i] : block.first + i] = float(double(source[i]) - rounded);
    }
  });
}

// Adds W times the residual to y of the tokens that are marked.
int add_residuals(QwenrtQuantMatrix w, const float* x, float* y, int64_t tokens, const Kernels& kernels,
                  const uint8_t* marked) {
  const int64_t count = std::count(marked, marked + tokens, 1), columns = w.in_features, rows = w.out_features;
  if (!count) return QWENRT_OK;
  float *residuals, *products;
  if (!residual_scratch.room(array(residuals, count * columns), array(products, count * rows))) return QWENRT_NO_MEMORY;
  const IntegerInput shape = shape_of(w, count, kernels);
  for (int64_t t = 0, i = 0; t < tokens; ++t)
    if (marked[t]) residual_of(w, shape, x + t * columns, residuals + i++ * columns);
  w.bias = nullptr;  // y has it
  if (const int status = multiply(w, residuals, products, count, nullptr, kernels, nullptr)) return status;
  for (int64_t t = 0, i = 0; t < tokens; ++t) {
    if (!marked[t]) continue;
    for (int64_t n = 0; n < rows; ++n) y[t * rows + n] += products[i * rows + n];
    ++i;
  }
  return QWENRT_OK;
}

}  // namespace

int integer_linear_chunk(const Kernels& kernels, const QwenrtQuantMatrix& w, const QwenrtActivations& how,
                         const float* x, float* y, int64_t tokens) {
  uint8_t marked[kIntegerTokens] = {};
  if (const int status = multiply(w, x, y, tokens, &how, kernels, marked)) return status;
  return add_residuals(w, x, y, tokens, kernels, marked);
}
