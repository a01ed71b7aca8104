// The linears with 16-bit weights, and with bfloat16 ones in 12 bits: shares the rows between the threads.
#include <string.h>

#include <atomic>

#include "abi/dispatch.h"
#include "linear/dense12.h"
#include "linear/linears.h"
#include "linear/residual.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

constexpr int64_t kDenseRows = 16;  // of a dense matrix, that stay together

Scratch scratch;

// What the kernels want beside DenseProduct's x, where that is asked for.
struct Activations {
  const float* x;
  FixedInput fixed;
  SplitInput split;
};

// Rows [begin, end) of 16-bit weights, all tokens.
void multiply_rows(const Kernels& kernels, const DenseProduct& product, const Activations& in, int64_t begin,
                   int64_t end) {
  if (in.split.high) kernels.split_rows(product, in.split, begin, end);
  else if (in.fixed.pairs) kernels.fixed_rows(product, in.fixed, begin, end);
  else kernels.dense16_rows(product, begin, end);
}

struct DenseTask {
  DenseProduct product;
  Activations in;
  const Kernels* kernels;
  Shares shares;  // of kDenseRows each
};

void run_dense_task(void* context, int64_t i) {
  const DenseTask& t = *static_cast<const DenseTask*>(context);
  const int64_t end = t.shares.begin(i + 1) * kDenseRows, rows = t.product.out_features;
  multiply_rows(*t.kernels, t.product, t.in, t.shares.begin(i) * kDenseRows, end < rows ? end : rows);
}

constexpr float kOutlier = 64;        // times a token's mean; less, and what its block loses does not show
constexpr int64_t kSplitTokens = 8;   // from so many on, half a tile for nothing is faster than none
constexpr int64_t kFixedTokens = 32;  // from so many on, putting a panel into fixed point pays

struct LayOutTask {
  const float* x;
  int64_t tokens, in_features;
  float* tiled;
  float* outliers;  // [tokens]: above which a value is one; NULL: no fixed point is wanted
  int32_t* pairs;
  float* scales;
  uint8_t* in_float32;
};

void run_outliers_task(void* context, int64_t token) {
  const LayOutTask& t = *static_cast<const LayOutTask*>(context);
  t.outliers[token] = outlier_from(t.x + token * t.in_features, t.in_features, kOutlier);
}

// One block of a token to its lane of a tile; false where fixed point is not for it.
bool fix_block(const float* x, float outlier, int64_t tile, int32_t* pairs, float* scale) {
  const float largest = largest_of(x, kFixedBlock);
  if (!(largest <= kLargestFixed) || (largest > outlier && needs_residual(x, kFixedBlock, outlier, kFixedFar)))
    return false;
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
  bool fixed = t.outliers && inputs % kFixedBlock == 0;
  for (int64_t token = 0; token < t.tokens;) {
    const int64_t tile = next_tile(t.tokens - token), at = first * t.tokens + token * inputs;
    for (int64_t lane = 0; lane < tile; ++lane) {
      const float* x = t.x + (token + lane) * t.in_features + first;
      for (int64_t k = 0; k < inputs; ++k) out[k * tile + lane] = x[k];
      for (int64_t b = 0; fixed && b < blocks; ++b) {
        int32_t* const pairs = t.pairs + at / 2 + b * kFixedBlock / 2 * tile + lane;
        float* const scale = t.scales + at / kFixedBlock + b * tile + lane;
        fixed = fix_block(x + b * kFixedBlock, t.outliers[token + lane], tile, pairs, scale);
      }
    }
    out += tile * inputs, token += tile;
  }
  if (t.outliers) t.in_float32[slab] = !fixed;
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

// How much room the activations of so many tokens take, by the way they are laid out.
struct Sizes {
  int64_t tiled = 0, pairs = 0, scales = 0, outliers = 0, slabs = 0, split = 0;

  Sizes(const Kernels& kernels, int64_t tokens, int64_t in_features, bool rounded, bool is_half) {
    if (rounded && !is_half && kernels.split_rows && tokens >= kSplitTokens && in_features % kSplitInputs == 0)
      split = (tokens + kTokenTile - 1) / kTokenTile * kTokenTile * in_features;
    if (!kernels.dense_tiles_from || tokens < kernels.dense_tiles_from) return;
    tiled = tokens * in_features;
    if (!rounded || !kernels.fixed_rows || tokens < kFixedTokens) return;
    pairs = (tiled + 1) / 2, scales = tiled / kFixedBlock + 1, outliers = tokens;
    slabs = (in_features + kDenseSlab - 1) / kDenseSlab;
  }
};

// x as `kernels` want it of so many tokens, and room for `rows` as well; false where there is no memory.
bool lay_out(const Kernels& kernels, const DenseProduct& product, bool rounded, Activations& in, Array<uint16_t> rows) {
  const float* const x = product.x;
  const int64_t tokens = product.tokens, in_features = product.in_features;
  const Sizes sizes(kernels, tokens, in_features, rounded, product.is_half);
  LayOutTask task{x, tokens, in_features, nullptr, nullptr, nullptr, nullptr, nullptr};
  SplitTask split{x, tokens, in_features, nullptr, nullptr};
  if (!scratch.room(array(task.tiled, sizes.tiled), array(task.pairs, sizes.pairs), array(task.scales, sizes.scales),
                    array(task.outliers, sizes.outliers), array(task.in_float32, sizes.slabs),
                    array(split.high, sizes.split), array(split.low, sizes.split), rows))
    return false;
  in = {x, {}, {split.high, split.low}};
  if (sizes.split) parallel_for((tokens + kTokenTile - 1) / kTokenTile, run_split_task, &split);
  if (sizes.split || !sizes.tiled) return true;
  if (sizes.pairs) parallel_for(tokens, run_outliers_task, &task);
  parallel_for((in_features + kDenseSlab - 1) / kDenseSlab, run_lay_out_task, &task);
  in = {task.tiled, {task.pairs, task.scales, task.in_float32}, {}};
  return true;
}

// Few tokens: the kernel reads 12 bits and multiplies what they stand for.
struct FewTask {
  const QwenrtDense12* w;
  const float* x;  // [tokens][token_stride12]
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
  DenseProduct product;  // of all rows; its weights are those of one turn
  Activations in;
  int64_t together;  // rows of a turn
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
    DenseProduct turn = t.product;
    turn.w = rows, turn.bias = w.bias ? w.bias + begin : nullptr, turn.y += begin;
    multiply_rows(*t.kernels, turn, t.in, 0, count);
  }
}

int few_tokens(const Kernels& kernels, const QwenrtDense12& w, const float* x, float* y, int64_t tokens) {
  const int64_t stride = token_stride12(w);
  if (tokens > 1 || w.in_features % QWENRT_CHUNK) {
    float* padded;
    if (!scratch.room(array(padded, tokens * stride))) return QWENRT_NO_MEMORY;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < stride; ++i) padded[t * stride + i] = i < w.in_features ? x[t * w.in_features + i] : 0.0f;
    x = padded;
  }
  const int64_t units = (w.out_features + kDenseRows - 1) / kDenseRows;
  FewTask task{&w, x, y, tokens, &kernels, shares_of(units, w.out_features * w.in_features * tokens)};
  parallel_for(task.shares.count, run_few_task, &task);
  return QWENRT_OK;
}

int many_tokens(const Kernels& kernels, const QwenrtDense12& w, const float* x, float* y, int64_t tokens,
                bool rounded) {
  const bool split = Sizes(kernels, tokens, w.in_features, rounded, false).split;
  const int64_t together = split ? kSplitRows : kDenseRows, units = (w.out_features + together - 1) / together;
  const int64_t threads = units < pool_threads() ? units : pool_threads();
  ManyTask task{&w,     {nullptr, nullptr, x, y, tokens, w.out_features, w.in_features, false}, {}, together, &kernels,
                nullptr};
  if (!lay_out(kernels, task.product, rounded, task.in, array(task.rows, threads * together * w.in_features)))
    return QWENRT_NO_MEMORY;
  task.product.x = task.in.x;
  parallel_for(threads, run_many_task, &task);
  return QWENRT_OK;
}

}  // namespace

int dense16_linear(const Kernels& kernels, DenseProduct product, bool rounded) {
  const int64_t units = (product.out_features + kDenseRows - 1) / kDenseRows;
  const Shares shares = shares_of(units, product.out_features * product.in_features * product.tokens);
  DenseTask task{product, {}, &kernels, shares};
  uint16_t* none = nullptr;
  if (!lay_out(kernels, product, rounded, task.in, array(none, 0))) return QWENRT_NO_MEMORY;
  task.product.x = task.in.x;
  parallel_for(shares.count, run_dense_task, &task);
  return QWENRT_OK;
}

int dense12_linear(const Kernels& kernels, const QwenrtDense12& w, const float* x, float* y, int64_t tokens,
                   bool rounded) {
  const bool split = Sizes(kernels, tokens, w.in_features, rounded, false).split;
  if (tokens <= kernels.dense12_tokens && !split) return few_tokens(kernels, w, x, y, tokens);
  return many_tokens(kernels, w, x, y, tokens, rounded);
}

int qwenrt_rounds_dense(const QwenrtHandle* with, int is_half) {
  return linear_kernels(*with).fixed_rows || (linear_kernels(*with).split_rows && !is_half);
}
