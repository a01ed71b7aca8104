// Quantised linears; with exact activations, lays these out and shares the rows between the threads.
#include <math.h>
#include <string.h>

#include "linear/linears.h"
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

int exact_linear_chunk(const Kernels& kernels, const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens) {
  const int64_t per_word = 32 / w.bits;
  QuantInput in;
  in.tokens = tokens;
  in.tile = tokens >= 3 ? 4 : tokens;
  in.tiles = (tokens + in.tile - 1) / in.tile;
  in.padded = w.groups * w.words_per_group * per_word;
  const int64_t lanes = in.tiles * in.tile;
  float *tiled, *sums;
  if (!scratch.room(array(tiled, lanes * in.padded), array(sums, lanes * w.groups))) return QWENRT_NO_MEMORY;
  if (lanes != tokens) {  // nobody writes the lanes of tokens that there are not
    memset(tiled, 0, size_t(lanes * in.padded) * sizeof(float));
    memset(sums, 0, size_t(lanes * w.groups) * sizeof(float));
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* token_x = tiled + (t / in.tile) * in.tile * in.padded + t % in.tile;
    float* token_sums = sums + (t / in.tile) * in.tile * w.groups + t % in.tile;
    const auto lay_out = w.bits == 4 ? lay_out_token<4> : lay_out_token<8>;
    if (!lay_out(w, x + t * w.in_features, token_x, token_sums, in.tile)) return QWENRT_NOT_FINITE;
  }
  in.x = tiled;
  in.sums = sums;
  const int64_t blocks = (w.out_features + QWENRT_BLOCK - 1) / QWENRT_BLOCK;
  QuantTask task{&w, in, y, shares_of(blocks, w.out_features * w.in_features * tokens), &kernels};
  parallel_for(task.shares.count, run_quant_task, &task);
  return QWENRT_OK;
}

}  // namespace

int quantized_linear(const Kernels& kernels, const QwenrtQuantMatrix& w, const QwenrtActivations& how, const float* x,
                     float* y, int64_t tokens) {
  if (w.bits != 4 && w.bits != 8) return QWENRT_BAD_ARGUMENT;
  if (how.kind < QWENRT_EXACT || how.kind > QWENRT_INT8) return QWENRT_BAD_ARGUMENT;
  const bool exact = how.kind == QWENRT_EXACT;
  const int64_t most = exact ? kTokensAtOnce : kIntegerTokens;
  for (int64_t t = 0; t < tokens; t += most) {
    const int64_t chunk = tokens - t < most ? tokens - t : most;
    const float* in = x + t * w.in_features;
    float* out = y + t * w.out_features;
    const int status =
        exact ? exact_linear_chunk(kernels, w, in, out, chunk) : integer_linear_chunk(kernels, w, how, in, out, chunk);
    if (status != QWENRT_OK) return status;
  }
  return QWENRT_OK;
}
