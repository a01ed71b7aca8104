// The linears with 16-bit weights, and with bfloat16 ones in 12 bits: shares the rows between the threads.
#include <atomic>

#include "dense12.h"
#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kDenseRows = 16;  // of a dense matrix, that stay together
constexpr int64_t kFewTokens = 15;  // beside which 12 bits are multiplied as they are read

Scratch scratch;

struct DenseTask {
  const uint16_t* w;
  const float* bias;
  const float* x;
  float* y;
  int64_t tokens, out_features, in_features;
  int is_half;
  const Kernels* kernels;
  Shares shares;  // of kDenseRows each
};

void run_dense_task(void* context, int64_t i) {
  const DenseTask& t = *static_cast<const DenseTask*>(context);
  const int64_t end = t.shares.begin(i + 1) * kDenseRows;
  t.kernels->dense16_rows(t.w, t.bias, t.x, t.y, t.tokens, t.out_features, t.in_features, t.is_half,
                          t.shares.begin(i) * kDenseRows, end < t.out_features ? end : t.out_features);
}

struct TileTask {
  const float* x;
  float* tiled;
  int64_t tokens, in_features;
};

// One slab of inputs, as kernels.h says of dense activations in tiles.
void run_tile_task(void* context, int64_t slab) {
  const TileTask& t = *static_cast<const TileTask*>(context);
  const int64_t first = slab * kDenseSlab, rest = t.in_features - first, inputs = rest < kDenseSlab ? rest : kDenseSlab;
  float* out = t.tiled + first * t.tokens;
  for (int64_t token = 0; token < t.tokens;) {
    const int64_t tile = next_tile(t.tokens - token);
    for (int64_t lane = 0; lane < tile; ++lane) {
      const float* x = t.x + (token + lane) * t.in_features + first;
      for (int64_t k = 0; k < inputs; ++k) out[k * tile + lane] = x[k];
    }
    out += tile * inputs, token += tile;
  }
}

// Floats that lay_out needs.
int64_t tiled_floats(const Kernels& kernels, int64_t tokens, int64_t in_features) {
  return kernels.dense_tiles_from && tokens >= kernels.dense_tiles_from ? tokens * in_features : 0;
}

// x in tiles where so many tokens want it, in `memory` of tiled_floats().
const float* lay_out(const Kernels& kernels, const float* x, float* memory, int64_t tokens, int64_t in_features) {
  if (!tiled_floats(kernels, tokens, in_features)) return x;
  TileTask task{x, memory, tokens, in_features};
  parallel_for((in_features + kDenseSlab - 1) / kDenseSlab, run_tile_task, &task);
  return memory;
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
  const float* x;
  float* y;
  int64_t tokens, units;
  const Kernels* kernels;
  uint16_t* rows;  // [threads][kDenseRows][in_features]
  std::atomic<int64_t> next{0};
};

void run_many_task(void* context, int64_t thread) {
  ManyTask& t = *static_cast<ManyTask*>(context);
  const QwenrtDense12& w = *t.w;
  uint16_t* const rows = t.rows + thread * kDenseRows * w.in_features;
  for (;;) {
    const int64_t begin = t.next.fetch_add(1, std::memory_order_relaxed) * kDenseRows;
    if (begin >= w.out_features) return;
    const int64_t count = w.out_features - begin < kDenseRows ? w.out_features - begin : kDenseRows;
    for (int64_t r = 0; r < count; ++r) unpack_row(*t.kernels, w, begin + r, rows + r * w.in_features);
    t.kernels->dense16_rows(rows, w.bias ? w.bias + begin : nullptr, t.x, t.y + begin, t.tokens, w.out_features,
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

int many_tokens(const QwenrtDense12& w, const float* x, float* y, int64_t tokens, const Kernels& kernels) {
  const int64_t units = (w.out_features + kDenseRows - 1) / kDenseRows;
  const int64_t threads = units < pool_threads() ? units : pool_threads();
  const int64_t floats = tiled_floats(kernels, tokens, w.in_features);
  const int64_t shorts = threads * kDenseRows * w.in_features;
  char* const memory = scratch.room(floats * int64_t(sizeof(float)) + shorts * int64_t(sizeof(uint16_t)));
  if (!memory) return QWENRT_NO_MEMORY;
  float* const tiled = reinterpret_cast<float*>(memory);
  ManyTask task{&w, lay_out(kernels, x, tiled, tokens, w.in_features), y, tokens, units, &kernels,
                reinterpret_cast<uint16_t*>(tiled + floats)};
  parallel_for(threads, run_many_task, &task);
  return QWENRT_OK;
}

}  // namespace

int qwenrt_dense16_linear(const uint16_t* w, const float* bias, const float* x, float* y, int64_t tokens,
                          int64_t out_features, int64_t in_features, int is_half) {
  PoolLock lock;
  const int64_t units = (out_features + kDenseRows - 1) / kDenseRows;
  const Shares shares = shares_of(units, out_features * in_features * tokens);
  const Kernels& kernels = linear_kernels();
  const int64_t floats = tiled_floats(kernels, tokens, in_features);
  float* const tiled = reinterpret_cast<float*>(scratch.room(floats * int64_t(sizeof(float))));
  if (floats && !tiled) return QWENRT_NO_MEMORY;
  x = lay_out(kernels, x, tiled, tokens, in_features);
  DenseTask task{w, bias, x, y, tokens, out_features, in_features, is_half, &kernels, shares};
  parallel_for(shares.count, run_dense_task, &task);
  return QWENRT_OK;
}

int qwenrt_dense12_linear(const QwenrtDense12* w, const float* x, float* y, int64_t tokens) {
  if (tokens < 1) return QWENRT_OK;
  PoolLock lock;
  const Kernels& kernels = linear_kernels();
  const bool few = kernels.dense12_rows && tokens <= kFewTokens;
  return few ? few_tokens(*w, x, y, tokens, kernels) : many_tokens(*w, x, y, tokens, kernels);
}
