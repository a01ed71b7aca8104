// The C ABI of what a decoder layer does between its linears: attention over the paged cache, norms, rotary, silu.
// Activations are float32. Semantics are those of qwenrt/ops/reference.py, sums in another order.
#pragma once
#include "abi/qwenrt_cpu.h"

// Sequences of one step, the same for every layer. Token j of sequence s is row first_tokens[s] + j of the activations
// and has position kv_lens[s] - q_lens[s] + j. Its block ids are blocks[tables[s]], blocks[tables[s] + 1], ...
typedef struct {
  int64_t count;
  const int64_t* first_tokens;
  const int64_t* q_lens;
  const int64_t* kv_lens;
  const int64_t* tables;
  const int64_t* blocks;
} QwenrtSequences;

// One layer's cache, contiguous: slot s is row s. Codes where the scales are given: x = scale * code + zero. Where
// there are factors x is (key - k_offset) / k_factor, and qwenrt_rotary_store multiplies queries by k_factor.
typedef struct {
  void* k;  // [slots][num_kv_heads][head_dim] float32 or uint8
  void* v;
  float* k_scale;  // [slots][num_kv_heads] or NULL
  float* k_zero;
  float* v_scale;
  float* v_zero;
  int64_t block_size;
  int64_t num_kv_heads;
  int64_t head_dim;
  const float* k_offset;  // [num_kv_heads][head_dim], both or none, beside codes only
  const float* k_factor;
  int64_t rounded;  // whether short queries, and their weights, may be rounded to 16 bits beside codes
} QwenrtCache;

// out [tokens][num_heads][head_dim] = causal attention over the cache, where this step's keys and values are already;
// query rows are q_stride floats apart. Of the keys it may see, a query sees the last `window` (0: all). Only rows of
// `sequences` are written; each is the same, bit for bit, in every batch and with any number of threads.
// Returns QWENRT_BAD_ARGUMENT where head_dim is not a multiple of 8 up to 256 or the heads do not divide.
QWENRT_API int qwenrt_attention(const QwenrtHandle* with, const QwenrtSequences* sequences, const QwenrtCache* cache,
                                const float* q, int64_t q_stride, int64_t num_heads, float* out, float scale,
                                int64_t window);

// out [rows][dim] = x / sqrt(mean(x^2) + eps) * weight [dim], each product rounded by itself.
QWENRT_API int qwenrt_rms_norm(const QwenrtHandle* with, const float* x, const float* weight, float* out, int64_t rows,
                               int64_t dim, float eps);
// gate_up [tokens][2 * inner] -> out [tokens][inner] = silu(first half) * second half.
QWENRT_API int qwenrt_silu_and_mul(const QwenrtHandle* with, const float* gate_up, float* out, int64_t tokens,
                                   int64_t inner);

// out [tokens][heads][head_dim] = x, likewise, times sigmoid(gate), whose heads are head_stride floats apart and whose
// tokens token_stride. out may be x.
QWENRT_API int qwenrt_gate_output(const QwenrtHandle* with, const float* x, const float* gate, int64_t token_stride,
                                  int64_t head_stride, float* out, int64_t tokens, int64_t heads, int64_t head_dim);

// One step's queries, keys and values on their way from the linear to attention and the cache.
typedef struct {
  const float* qkv;      // [tokens][num_heads + 2 * num_kv_heads][head_dim], contiguous; num_heads more where gated
  float* qk;             // [tokens][num_heads + num_kv_heads][head_dim]: rotated queries and keys
  const float* q_norm;   // [head_dim] or NULL: each head is normed before it is rotated
  const float* k_norm;   // likewise; both or none
  const float* cos;      // [tokens][rotary_dim]
  const float* sin;
  const float* q_scale;  // [tokens] or NULL: multiplies each rotated query
  const int64_t* slots;  // [tokens]: where keys and values go, -1: nowhere; without a cache NULL
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;    // a multiple of 8, up to 256
  int64_t rotary_dim;  // even; the other channels pass
  float eps;
  int32_t gated;  // whether each query head of qkv is followed by its gate, which is for qwenrt_gate_output
} QwenrtRotary;

// Writes a->qk and, where there is a cache, this step's keys and values to their slots.
QWENRT_API int qwenrt_rotary_store(const QwenrtHandle* with, const QwenrtRotary* a, const QwenrtCache* cache,
                                   int64_t tokens);

#define QWENRT_LORA_RANK 512

// What an adapter makes of one part of a linear for some of a step's tokens, `lora` of the Python package being the
// definition: y = row_scale * (W x + scale * B (A x)) + bias + added.
typedef struct {
  const void* matrix;      // that of the QwenrtLinear
  const float* a;          // [rank][in_features]
  const float* b;          // [rank][rows]: B, transposed
  const float* row_scale;  // [rows] or NULL
  const float* bias;       // [rows] of the linear, for row_scale to leave alone; NULL: none
  const float* added;      // [rows] or NULL
  int64_t rank;            // up to QWENRT_LORA_RANK; 0: only `added` is new
  int64_t rows;
  int64_t first_row;       // of the linear
  int64_t first_token;     // of the step
  int64_t last_token;      // behind the last
  float scale;
  float reserved;
} QwenrtLora;

// y [tokens][outputs], what a linear gave of x [tokens][inputs] -> with what `count` pairs for it make of it, in turn.
QWENRT_API int qwenrt_lora(const QwenrtHandle* with, const QwenrtLora* loras, int64_t count, const float* x,
                           int64_t inputs, float* y, int64_t outputs, int64_t tokens);

// One layer of linear attention (a gated delta net) in one step, as `delta_net` of the Python package defines it.
// Value head h reads key head h / (value_heads / key_heads), or h % key_heads where they are tiled.
typedef struct {
  const float* projected;   // [tokens][channels + value_heads * value_dim]: queries, keys, values, then z
  const float* rates;       // [tokens][2 * value_heads]: b, then a
  const float* conv;        // [taps][channels], channels = 2 * key_heads * key_dim + value_heads * value_dim
  const float* log_decay;   // [value_heads]
  const float* decay_bias;  // [value_heads]
  const float* out_norm;    // [value_dim]
  const int64_t* slots;     // [sequences]: where their states are
  // NULL, or [tokens]: for the last tokens of a sequence, but not its first, the slot that the state after each is left
  // in, the one before going on from there; -1 for all others, whose state goes on in the sequence's own slot.
  const int64_t* trail;
  float* conv_states;       // [slots][taps - 1][channels]
  float* delta_states;      // [slots][value_heads][key_dim][value_dim]
  float* mixed;             // [tokens][channels]: room to work in
  float* out;               // [tokens][value_heads * value_dim]
  int64_t key_heads;
  int64_t value_heads;
  int64_t key_dim;    // up to 256
  int64_t value_dim;  // a multiple of 8, up to 256
  int64_t taps;       // 2 to 8
  int64_t tiled;
  float eps;
  float reserved;
} QwenrtDeltaNet;

// Writes a->out, and moves the states of the step's sequences on; one that begins in this step begins at zero. What a
// token reads is the same, bit for bit, in every batch, however its prompt was cut, and with any number of threads.
QWENRT_API int qwenrt_delta_net(const QwenrtHandle* with, const QwenrtDeltaNet* a, const QwenrtSequences* sequences);
