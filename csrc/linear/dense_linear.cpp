// The linears with 16-bit weights, and with bfloat16 ones in 12 bits: shares the rows between the threads.
#include <atomic>

#include "linear/dense12.h"
#include "abi/dispatch.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"
#include "linear/uneven.h"

namespace {

constexpr int64_t kDenseRows = 16;  // of a dense matrix, that stay together
constexpr int64_t kFewTokens = 15;  // beside which 12 bits are multiplied as they are read

Scratch scratch;

// x as the kernels read it: as it is, or in tiles; and then, where that is asked for, in fixed point or split as well.
struct Activations {
  const float* x;
  FixedInput fixed;
  SplitInput split;
};

// Rows of 16-bit weights, all tokens; `begin` and `end` of `w`.
void multiply_rows(const Kernels& kernels, const uint16_t* w, const float* bias, const Activations& in, float* y,
                   int64_t tokens, int64_t out_features, int64_t in_features, int is_half, int64_t begin, int64_t end) {
  if (in.split.high)
    kernels.split_rows(w, bias, in.x, in.split, y, tokens, out_features, in_features, begin, end);
  else if (in.fixed.pairs)
    kernels.fixed_rows(w, bias, in.x, in.fixed, y, tokens, out_features, in_features, is_half, begin, end);
  else kernels.dense16_rows(w, bias, in.x, y, tokens, out_features, in_features, is_half, begin, end);
}

struct DenseTask {
  const uint16_t* w;
  const float* bias;
  Activations in;
  float* y;
  int64_t tokens, out_features, in_features;
  int is_half;
  const Kernels* kernels;
  Shares shares;  // of kDenseRows each
};

void run_dense_task(void* context, int64_t i) {
  const DenseTask& t = *static_cast<const DenseTask*>(context);
  const int64_t end = t.shares.begin(i + 1) * kDenseRows;
  multiply_rows(*t.kernels, t.w, t.bias, t.in, t.y, t.tokens, t.out_features, t.in_features, t.is_half,
                t.shares.begin(i) * kDenseRows, end < t.out_features ? end : t.out_features);
}

constexpr float kMassive = 64;        // times a token's mean; less, and what its block loses does not show
constexpr int64_t kFixedTokens = 32;  // from so many on, putting a panel into fixed point pays

struct LayOutTask {
  const float* x;
  int64_t tokens, in_features;
  float* tiled;
  float* massive;  // [tokens]; NULL: no fixed point is wanted
  int32_t* pairs;
  float* scales;
  uint8_t* uneven;
};

void run_massive_task(void* context, int64_t token) {
  const LayOutTask& t = *static_cast<const LayOutTask*>(context);
  t.massive[token] = massive_from(t.x + token * t.in_features, t.in_features, kMassive);
}

// One block of a token to its lane of a tile; false where fixed point is not for it.
bool fix_block(const float* x, float massive, int64_t tile, int32_t* pairs, float* scale) {
  const float largest = largest_of(x, kFixedBlock);
  if (!(largest <= kLargestFixed) || (largest > massive && is_uneven(x, kFixedBlock, massive, kFixedFar))) return false;
  const bool zeros = largest < kSmallestActivation;
  const float inverse = zeros ? 0.0f : kFixedLimit / largest;
  *scale = zeros ? 0.0f : largest / kFixedLimit;
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to integers, ties to even
  int32_t q[kFixedBlock];
  for (int64_t i = 0; i < kFixedBlock; ++i) {
    const float shifted = x[i] * inverse + kRounds;
    memcpy(&q[i], &shifted, sizeof shifted);
    q[i] -= 0x4b400000;
  }
  for (int64_t i = 0; i < kFixedBlock; i += 2)
    pairs[i / 2 * tile] = int32_t((uint32_t(q[i]) & 0xffff) | uint32_t(q[i + 1]) << 16);
  return true;
}

// One slab of inputs, as isa/linear_kernels.h says of dense activations in tiles.
void run_lay_out_task(void* context, int64_t slab) {
  const LayOutTask& t = *static_cast<const LayOutTask*>(context);
  const int64_t first = slab * kDenseSlab, rest = t.in_features - first, inputs = rest < kDenseSlab ? rest : kDenseSlab;
  const int64_t blocks = inputs / kFixedBlock;
  float* out = t.tiled + first * t.tokens;
  bool fixed = t.massive && inputs % kFixedBlock == 0;
  for (int64_t token = 0; token < t.tokens;) {
    const int64_t tile = next_tile(t.tokens - token), at = first * t.tokens + token * inputs;
    for (int64_t lane = 0; lane < tile; ++lane) {
      const float* x = t.x + (token + lane) * t.in_features + first;
      for (int64_t k = 0; k < inputs; ++k) out[k * tile + lane] = x[k];
      for (int64_t b = 0; fixed && b < blocks; ++b) {
        int32_t* const pairs = t.pairs + at / 2 + b * kFixedBlock / 2 * tile + lane;
        float* const scale = t.scales + at / kFixedBlock + b * tile + lane;
        fixed = fix_block(x + b * kFixedBlock, t.massive[token + lane], tile, pairs, scale);
      }
    }
    out += tile * inputs, token += tile;
  }
  if (t.massive) t.uneven[slab] = !fixed;
}

struct SplitTask {
  const float* x;
  int64_t tokens, in_features;
  uint16_t *high, *low;
};

// kTokenTile tokens. The upper half of a float32's bits is a bfloat16; what it leaves out is rounded to another, but
// infinity and NaN have no rest.
void run_split_task(void* context, int64_t tile) {
  const SplitTask& t = *static_cast<const SplitTask*>(context);
  const int64_t first = tile * kTokenTile, at = first * t.in_features;
  const int64_t count = t.tokens - first < kTokenTile ? t.tokens - first : kTokenTile;
  for (int64_t lane = 0; lane < count; ++lane) {
    const float* x = t.x + (first + lane) * t.in_features;
    for (int64_t k = 0; k < t.in_features; ++k) {
      uint32_t bits, rest;
      memcpy(&bits, x + k, sizeof bits);
      const uint32_t upper = bits & 0xffff0000;
      float whole;
      memcpy(&whole, &upper, sizeof whole);
      const float difference = (bits & 0x7f800000) == 0x7f800000 ? 0.0f : x[k] - whole;
      memcpy(&rest, &difference, sizeof rest);
      const int64_t to = at + (k / 2 * kTokenTile + lane) * 2 + k % 2;
      t.high[to] = uint16_t(bits >> 16 | ((bits & 0x7fffffff) > 0x7f800000 ? 0x40 : 0));  // NaN stays one
      t.low[to] = uint16_t((rest + 0x7fff + (rest >> 16 & 1)) >> 16);
    }
  }
}

// What lay_out needs, in floats.
struct Sizes {
  int64_t tiled = 0, pairs = 0, scales = 0, massive = 0, uneven = 0, split = 0;

  Sizes(const Kernels& kernels, int64_t tokens, int64_t in_features, bool rounded, bool is_half) {
    if (rounded && !is_half && kernels.split_rows && tokens >= kernels.by_token_from && in_features % kSplitInputs == 0)
      split = (tokens + kTokenTile - 1) / kTokenTile * kTokenTile * in_features;
    if (!kernels.dense_tiles_from || tokens < kernels.dense_tiles_from) return;
    tiled = tokens * in_features;
    if (!rounded || !kernels.fixed_rows || tokens < kFixedTokens) return;
    pairs = (tiled + 1) / 2, scales = tiled / kFixedBlock + 1, massive = tokens;
    uneven = in_features / kDenseSlab / int64_t(sizeof(float)) + 1;
  }
  int64_t floats() const { return tiled + pairs + scales + massive + uneven + split; }
};

// x in tiles where so many tokens want it, in `memory` of Sizes.floats().
Activations lay_out(const Kernels& kernels, const float* x, float* memory, int64_t tokens, int64_t in_features,
                    bool rounded, bool is_half) {
  const Sizes sizes(kernels, tokens, in_features, rounded, is_half);
  if (sizes.split) {
    uint16_t* const high = reinterpret_cast<uint16_t*>(memory);
    SplitTask task{x, tokens, in_features, high, high + sizes.split};
    parallel_for((tokens + kTokenTile - 1) / kTokenTile, run_split_task, &task);
    return {x, {}, {task.high, task.low}};
  }
  if (!sizes.tiled) return {x, {}, {}};
  LayOutTask task{x, tokens, in_features, memory, nullptr, nullptr, nullptr, nullptr};
  if (sizes.pairs) {
    task.pairs = reinterpret_cast<int32_t*>(memory + sizes.tiled);
    task.scales = memory + sizes.tiled + sizes.pairs;
    task.massive = task.scales + sizes.scales;
    task.uneven = reinterpret_cast<uint8_t*>(task.massive + sizes.massive);
    parallel_for(tokens, run_massive_task, &task);
  }
  parallel_for((in_features + kDenseSlab - 1) / kDenseSlab, run_lay_out_task, &task);
  return {memory, {task.pairs, task.scales, task.uneven}, {}};
}

// Few tokens: the kernel reads 12 bits and multiplies what they stand for.
struct FewTask {
  const QwenrtDense12* w;
  const float* x;  // [tokens][apart12]
  float* y;
  int64_t tokens;
  const Kernels* kernels;
  Shares shares;  // of kDenseRows each
};

void run_few_task(void* context, int64_t i) {
  const FewTask& t = *static_cast<const FewTask*>(context);
  const int64_t begin = t.shares.begin(i) * kDenseRows, end = t.shares.begin(i + 1) * kDenseRows;
  t.kernels->dense12_rows(*t.w, t.x, t.y, t.tokens, begin, end < t.w->out_features ? end : t.w->out_features);
}

// Many tokens: rows become 16 bits again, in the thread's own memory, and are multiplied as such.
struct ManyTask {
  const QwenrtDense12* w;
  Activations in;
  float* y;
  int64_t tokens, together;  // rows
  const Kernels* kernels;
  uint16_t* rows;  // [threads][together][in_features]
  std::atomic<int64_t> next{0};
};

void run_many_task(void* context, int64_t thread) {
  ManyTask& t = *static_cast<ManyTask*>(context);
  const QwenrtDense12& w = *t.w;
  uint16_t* const rows = t.rows + thread * t.together * w.in_features;
  for (;;) {
    const int64_t begin = t.next.fetch_add(1, std::memory_order_relaxed) * t.together;
    if (begin >= w.out_features) return;
    const int64_t count = w.out_features - begin < t.together ? w.out_features - begin : t.together;
    for (int64_t r = 0; r < count; ++r) unpack_row(*t.kernels, w, begin + r, rows + r * w.in_features);
    multiply_rows(*t.kernels, rows, w.bias ? w.bias + begin : nullptr, t.in, t.y + begin, t.tokens, w.out_features,
                  w.in_features, 0, 0, count);
  }
}

int few_tokens(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, const Kernels& kernels) {
  const int64_t apart = apart12(w);
  if (tokens > 1 || w.in_features % QWENRT_CHUNK) {
    float* const laid_out = reinterpret_cast<float*>(scratch.room(tokens * apart * int64_t(sizeof(float))));
    if (!laid_out) return QWENRT_NO_MEMORY;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < apart; ++i)
        laid_out[t * apart + i] = i < w.in_features ? x[t * w.in_features + i] : 0.0f;
    x = laid_out;
  }
  const int64_t units = (w.out_features + kDenseRows - 1) / kDenseRows;
  FewTask task{&w, x, y, tokens, &kernels, shares_of(units, w.out_features * w.in_features * tokens)};
  parallel_for(task.shares.count, run_few_task, &task);
  return QWENRT_OK;
}

int many_tokens(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, const Kernels& kernels, bool rounded) {
  const Sizes sizes(kernels, tokens, w.in_features, rounded, false);
  const int64_t together = sizes.split ? kSplitRows : kDenseRows, units = (w.out_features + together - 1) / together;
  const int64_t threads = units < pool_threads() ? units : pool_threads(), floats = sizes.floats();
  const int64_t shorts = threads * together * w.in_features;
  char* const memory = scratch.room(floats * int64_t(sizeof(float)) + shorts * int64_t(sizeof(uint16_t)));
  if (!memory) return QWENRT_NO_MEMORY;
  float* const tiled = reinterpret_cast<float*>(memory);
  ManyTask task{&w, lay_out(kernels, x, tiled, tokens, w.in_features, rounded, false), y, tokens, together, &kernels,
                reinterpret_cast<uint16_t*>(tiled + floats)};
  parallel_for(threads, run_many_task, &task);
  return QWENRT_OK;
}

}  // namespace

int qwenrt_dense16_linear(const QwenrtHandle* with, const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                          int64_t out_features, int64_t in_features, int is_half, int rounded) {
  PoolLock lock(with->threads);
  const int64_t units = (out_features + kDenseRows - 1) / kDenseRows;
  const Shares shares = shares_of(units, out_features * in_features * tokens);
  const Kernels& kernels = linear_kernels(*with);
  const int64_t floats = Sizes(kernels, tokens, in_features, rounded, is_half).floats();
  float* const memory = reinterpret_cast<float*>(scratch.room(floats * int64_t(sizeof(float))));
  if (floats && !memory) return QWENRT_NO_MEMORY;
  const Activations in = lay_out(kernels, x, memory, tokens, in_features, rounded, is_half);
  DenseTask task{w, bias, in, y, tokens, out_features, in_features, is_half, &kernels, shares};
  parallel_for(shares.count, run_dense_task, &task);
  return QWENRT_OK;
}

int qwenrt_dense12_linear(const QwenrtHandle* with, const QwenrtDense12* w, const float* x, float* y, int64_t tokens, int rounded) {
  if (tokens < 1) return QWENRT_OK;
  PoolLock lock(with->threads);
  const Kernels& kernels = linear_kernels(*with);
  const bool few = kernels.dense12_rows && tokens <= kFewTokens;
  return few ? few_tokens(*w, x, y, tokens, kernels) : many_tokens(*w, x, y, tokens, kernels, rounded);
}

int qwenrt_rounds_dense(const QwenrtHandle* with, int is_half) {
  return linear_kernels(*with).fixed_rows || (linear_kernels(*with).split_rows && !is_half);
}
