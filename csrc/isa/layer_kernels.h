// The table of a decoder layer's kernels for one instruction set, as linear_kernels.h is that of the linears.
#pragma once
#include "isa/linear_kernels.h"
#include "abi/qwenrt_layer.h"

constexpr int64_t kShortQuery = 16;  // tokens of a sequence that walks its context in chunks; a longer one in tiles
constexpr int64_t kChunk = 256;      // keys of one partial softmax; chunks begin at multiples of it
constexpr int64_t kRowsAtOnce = 64;  // query rows whose scores of one chunk are held together
constexpr int64_t kTileRows = 192;   // most query rows of a tile
constexpr int64_t kTileKeys = 128;   // tiles of keys begin at multiples of it
constexpr int64_t kBlockRows = 6;    // query rows whose sums are in registers together

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

// What one thread computes at a time, of one sequence.
struct AttentionPiece {
  int64_t sequence;
  int64_t first_head, last_head;  // key heads
  int64_t chunk;                  // of a short query's context
  int64_t first_row, last_row;    // of a long one's q_len * group rows of each key head
  int64_t partials;               // the first row of the chunk's; -1: it is the only one and writes to out
  int64_t left;                   // where to count down the chunks of these heads; -1: nothing to combine
};

// Floats of the memory that `attend` works in, whatever the piece.
static constexpr int64_t attention_memory(int64_t head_dim) {
  const int64_t chunk = 2 * kRowsAtOnce * kChunk + 24 * kChunk;
  const int64_t tile = 2 * (kTileRows + kTileKeys) * head_dim + kTileRows * (kTileKeys + 3);
  return ((chunk > tile ? chunk : tile) + 15) / 16 * 16;
}

struct LayerKernels {
  // One piece, in `memory` of attention_memory() floats that begin at a cache line.
  void (*attend)(const Attention& a, const AttentionPiece& piece, const Partials& partials, float* memory);
  // One row of out [head_dim] from its partials in `chunks` chunks, which are `stride` rows apart.
  void (*combine)(const Partials& partials, int64_t row, int64_t chunks, int64_t stride, int64_t head_dim, float* out);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t dim, float* out);
  void (*silu_and_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*gate_output)(const float* x, const float* gate, int64_t count, float* out);
  void (*rotary_store)(const QwenrtRotary& a, const QwenrtCache* cache, int64_t token);
  // Channels [first, last) of a token of a gated delta net, convolved and through silu: inputs[j] is what tap j reads.
  void (*convolve)(const float* const* inputs, const float* conv, int64_t taps, int64_t channels, int64_t first,
                   int64_t last, float* out);
  // One value head of one sequence, whose `count` tokens begin with row `token`, over its `state`.
  void (*delta_head)(const QwenrtDeltaNet& a, int64_t head, int64_t token, int64_t count, float* state);
  // The sum of exp((x - largest) / temperature) over x [count].
  double (*sum_exponentials)(const float* x, int64_t count, float largest, float temperature);
  // What one pair makes of the linear's outputs y for x [tokens][inputs]; y: its rows' of the first token, those of the
  // next `stride` floats on.
  void (*lora)(const QwenrtLora& l, const float* x, int64_t inputs, float* y, int64_t stride, int64_t tokens);
};

const LayerKernels* scalar_layer_kernels();
const LayerKernels* avx2_layer_kernels();
const LayerKernels* avx512_layer_kernels();
const LayerKernels* neon_layer_kernels();
// How many tasks to make of `most` equal ones with `work` multiply-adds in all.
int64_t layer_tasks(int64_t most, int64_t work);
