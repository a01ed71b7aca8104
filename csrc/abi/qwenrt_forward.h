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

// A gated delta net in the place of attention.
typedef struct {
  QwenrtDeltaNet net;  // its projected, rates, slots, mixed and out are the step's, whatever is here
  QwenrtLinear rates;  // b and a of the same normed inputs as qkv's
} QwenrtDeltaLayer;

typedef struct {
  const float* input_norm;  // [hidden]
  const float* post_norm;
  const float* q_norm;  // [head_dim] or NULL, as of QwenrtRotary
  const float* k_norm;
  QwenrtLinear qkv;  // where gated each query head is followed by its gate; of a delta net z as well
  QwenrtLinear o;
  QwenrtLinear gate_up;  // this and `down` mean nothing where there are experts
  QwenrtLinear down;
  const QwenrtExperts* experts;   // or NULL
  const QwenrtDeltaLayer* delta;  // or NULL; beside one the norms and all below but eps mean nothing
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t window;  // as of qwenrt_attention
  int64_t gated;   // whether what each head attended to is multiplied by its gate
  float eps;
  float scale;  // of scores
} QwenrtLayer;

// Computes y = x W^T + bias where qwenrt_linear refuses x as not finite, or w is elsewhere -> QWENRT_OK, or what the step
// is to return.
typedef int (*QwenrtInstead)(const QwenrtLinear* w, const float* x, float* y, int64_t tokens);

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
  const int64_t* state_slots;  // as of QwenrtDeltaNet; NULL where no layer has one
  const int64_t* state_trail;  // its trail, or NULL
  QwenrtInstead instead;       // or NULL: the step then ends where a linear refuses, states moved on or not
  const QwenrtLora* loras;     // [lora_count], sorted by matrix: of the layers' linears but those of experts
  int64_t lora_count;
} QwenrtStep;

// What follows the layers.
typedef struct {
  const float* norm;  // [hidden]
  QwenrtLinear linear;
  float eps;
} QwenrtHead;

// x [tokens][hidden]: layers [0, count) in turn, each with its cache (a delta net has its states), leave the residual stream in its place; then, of
// the step's logit rows, logits [logit_row_count][out_features of the head]; head and logits may be NULL where there
// are none. Returns what the first op that fails does; x, logits and the slots of the step's tokens then hold anything.
QWENRT_API int qwenrt_forward(const QwenrtHandle* with, const QwenrtLayer* layers, const QwenrtCache* caches,
                              int64_t count, const QwenrtHead* head, const QwenrtStep* step, float* x, float* logits);
