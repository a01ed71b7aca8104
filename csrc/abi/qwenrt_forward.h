// The C ABI of a forward pass through all decoder layers: what a step does between the embedding and the sampler.
#pragma once
#include "abi/qwenrt_layer.h"

// A mixture of experts, as `route` and `norm_moe_add` of the Python package define it: a token's result is the sum of
// its `top_k` best experts, added in the order of their numbers, and of the shared one.
typedef struct {
  const float* router;           // [count][hidden]
  const QwenrtLinear* gate_up;   // [count], or count + 1 with a shared expert, which is the last
  const QwenrtLinear* down;      // likewise
  const float* shared_gate;      // [hidden]: the shared expert's weight is its sigmoid; NULL: there is none
  int64_t count;
  int64_t top_k;                 // 1 to count
  int64_t norm_topk_prob;        // whether the chosen weights are made to sum to 1
} QwenrtExperts;

typedef struct {
  const float* input_norm;  // [hidden]
  const float* post_norm;
  const float* q_norm;  // [head_dim] or NULL, as of QwenrtRotary
  const float* k_norm;
  QwenrtLinear qkv;
  QwenrtLinear o;
  QwenrtLinear gate_up;  // this and `down` mean nothing where there are experts
  QwenrtLinear down;
  const QwenrtExperts* experts;  // or NULL
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t window;  // as of qwenrt_attention
  float eps;
  float scale;  // of scores
} QwenrtLayer;

// What the layers of one step share; the fields as in QwenrtRotary and QwenrtSequences.
typedef struct {
  const QwenrtSequences* sequences;  // all of the step's tokens belong to one
  const float* cos;
  const float* sin;
  const float* q_scale;
  const int64_t* slots;
  int64_t rotary_dim;
  int64_t tokens;
  const int64_t* logit_rows;  // [logit_row_count]: the tokens whose logits are asked for
  int64_t logit_row_count;
} QwenrtStep;

// What follows the layers.
typedef struct {
  const float* norm;  // [hidden]
  QwenrtLinear linear;
  float eps;
} QwenrtHead;

// x [tokens][hidden]: layers [0, count) in turn, each with its cache, leave the residual stream in its place; then, of
// the step's logit rows, logits [logit_row_count][out_features of the head]; head and logits may be NULL where there
// are none. Returns what the first op that fails does; x, logits and the slots of the step's tokens then hold anything.
QWENRT_API int qwenrt_forward(const QwenrtHandle* with, const QwenrtLayer* layers, const QwenrtCache* caches,
                              int64_t count, const QwenrtHead* head, const QwenrtStep* step, float* x, float* logits);
