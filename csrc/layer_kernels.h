// The table of a decoder layer's kernels for one instruction set, as kernels.h is that of the linears.
#pragma once
#include "kernels.h"
#include "qwenrt_layer.h"

constexpr int64_t kChunk = 256;     // keys of one partial softmax; chunks begin at multiples of it
constexpr int64_t kRowsAtOnce = 64;  // query rows whose scores of one chunk are held together

struct Attention {
  QwenrtSequences sequences;
  QwenrtCache cache;
  const float* q;
  float* out;
  int64_t q_stride, num_heads, window;
  float scale;
};

// What one chunk gives for each query row: the largest score, the sum of exp(score - largest), and the values' sum
// weighted by these. A row without a key in the chunk has sum 0. Row j * num_heads + h: head h of token j.
struct Partials {
  float* largest;  // [q_len * num_heads]
  float* sums;
  float* values;  // [q_len * num_heads][head_dim]
};

struct LayerKernels {
  // Key heads [first_head, last_head) of one chunk of one sequence.
  void (*attend)(const Attention& a, int64_t sequence, int64_t chunk, int64_t first_head, int64_t last_head,
                 const Partials& partials);
  // One row of out [head_dim] from its partials in `chunks` chunks, which are `stride` rows apart.
  void (*combine)(const Partials& partials, int64_t row, int64_t chunks, int64_t stride, int64_t head_dim, float* out);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t dim, float* out);
  void (*silu_and_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*rotary_store)(const QwenrtRotary& a, const QwenrtCache* cache, int64_t token);
  // The sum of exp((x - largest) / heat) over x [count].
  double (*sum_exponentials)(const float* x, int64_t count, float largest, float heat);
};

const LayerKernels* scalar_layer_kernels();
const LayerKernels* avx2_layer_kernels();
const LayerKernels* neon_layer_kernels();
// Those of the instruction set that qwenrt_isa() names.
const LayerKernels* layer_kernels();
// How many tasks to make of `most` equal ones with `work` multiply-adds in all.
int64_t layer_tasks(int64_t most, int64_t work);
