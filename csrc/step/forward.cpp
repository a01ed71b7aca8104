// A stack of decoder layers in one call: the ops of qwenrt_cpu.h and qwenrt_layer.h in their order, over one scratch
// memory, so that nothing but they costs time.
#include "abi/qwenrt_forward.h"

#include "abi/dispatch.h"
#include "step/experts.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

Scratch scratch;

// What one layer leaves for the next op; the mixer's and the MLP's share their memory.
struct Buffers {
  float* normed;    // [tokens][hidden]
  float* product;   // [tokens][hidden]: of o and of down
  float* qkv;       // [tokens][what the mixer's linear gives]
  float* qk;        // [tokens][num_heads + num_kv_heads][head_dim], or what a delta net works in
  float* attended;  // [tokens][inputs of o]
  float* rates;     // [tokens][2 value_heads]
  MlpBuffers mlp;
};

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The channels of a delta net's convolution.
int64_t channels(const QwenrtDeltaNet& net) { return 2 * net.key_heads * net.key_dim + net.value_heads * net.value_dim; }

// The widest of all layers, in floats a token.
struct Widths {
  int64_t hidden = 0, qkv = 0, qk = 0, attended = 0, rates = 0, gate_up = 0;

  void add(const QwenrtLayer& l) {
    hidden = larger(hidden, l.qkv.in_features);
    qkv = larger(qkv, l.qkv.out_features);
    qk = larger(qk, l.delta ? channels(l.delta->net) : (l.num_heads + l.num_kv_heads) * l.head_dim);
    attended = larger(attended, l.o.in_features);
    if (l.delta) rates = larger(rates, l.delta->rates.out_features);
    const int64_t experts = l.experts ? l.experts->count + (l.experts->shared_gate ? 1 : 0) : 0;
    for (int64_t i = 0; i < experts; ++i) gate_up = larger(gate_up, l.experts->gate_up[i].out_features);
    if (!l.experts) gate_up = larger(gate_up, l.gate_up.out_features);
  }
};

bool make_room(const QwenrtLayer* layers, int64_t count, int64_t tokens, Buffers& b) {
  Widths w;
  for (int64_t i = 0; i < count; ++i) w.add(layers[i]);
  const int64_t inner = (w.gate_up + 1) / 2, mixer = w.qkv + w.qk + w.attended + w.rates;
  float* shared;
  if (!scratch.room(array(b.normed, tokens * w.hidden), array(b.product, tokens * w.hidden),
                    array(shared, tokens * larger(mixer, w.gate_up + inner))))
    return false;
  b.qkv = b.mlp.gate_up = shared;
  b.qk = b.qkv + tokens * w.qkv;
  b.attended = b.qk + tokens * w.qk;
  b.rates = b.attended + tokens * w.attended;
  b.mlp.inner = b.mlp.gate_up + tokens * w.gate_up;
  return true;
}

struct AddTask {
  float* x;
  const float* y;
  int64_t count, tasks;
};

void add_task(void* context, int64_t i) {
  const AddTask& t = *static_cast<const AddTask*>(context);
  for (int64_t at = t.count * i / t.tasks; at < t.count * (i + 1) / t.tasks; ++at) t.x[at] += t.y[at];
}

constexpr int64_t kManyFloats = 1 << 16;  // worth waking the workers for

// x += y
void add(float* x, const float* y, int64_t count) {
  AddTask task{x, y, count, count < kManyFloats ? 1 : pool_threads()};
  parallel_for(task.tasks, add_task, &task);
}

// b.qkv -> b.attended, over the cache.
int attend(const QwenrtHandle* with, const QwenrtLayer& l, const QwenrtStep& step, const QwenrtCache& cache,
           const Buffers& b) {
  const int64_t dim = l.head_dim, stride = (l.num_heads + l.num_kv_heads) * dim;
  const QwenrtRotary rotary{b.qkv,        b.qk,       l.q_norm,    l.k_norm,       step.cos, step.sin,
                            step.q_scale, step.slots, l.num_heads, l.num_kv_heads, dim,      step.rotary_dim,
                            l.eps,        int32_t(l.gated)};
  if (const int status = qwenrt_rotary_store(with, &rotary, &cache, step.tokens)) return status;
  const int attended = qwenrt_attention(with, step.sequences, &cache, b.qk, stride, l.num_heads, b.attended,
                                        l.scale, l.window);
  if (attended || !l.gated) return attended;
  return qwenrt_gate_output(with, b.attended, b.qkv + dim, l.qkv.out_features, 2 * dim, b.attended, step.tokens,
                            l.num_heads, dim);
}

// b.qkv and b.rates -> b.attended, over the states.
int move_states(const QwenrtHandle* with, const QwenrtLayer& l, const QwenrtStep& step, const Buffers& b) {
  QwenrtDeltaNet net = l.delta->net;
  net.projected = b.qkv, net.rates = b.rates, net.slots = step.state_slots, net.trail = step.state_trail;
  net.mixed = b.qk, net.out = b.attended;
  return qwenrt_delta_net(with, &net, step.sequences);
}

// x += mixer(norm(x))
int mixer_block(const Linears& linear, const QwenrtLayer& l, const QwenrtStep& step, const QwenrtCache& cache,
                const Buffers& b, float* x) {
  const QwenrtHandle* const with = linear.with;
  const int64_t tokens = step.tokens, hidden = l.qkv.in_features;
  if (const int status = qwenrt_rms_norm(with, x, l.input_norm, b.normed, tokens, hidden, l.eps)) return status;
  if (const int status = linear(l.qkv, b.normed, b.qkv, tokens)) return status;
  if (l.delta)
    if (const int status = linear(l.delta->rates, b.normed, b.rates, tokens)) return status;
  if (const int status = l.delta ? move_states(with, l, step, b) : attend(with, l, step, cache, b)) return status;
  if (const int status = linear(l.o, b.attended, b.product, tokens)) return status;
  add(x, b.product, tokens * hidden);
  return QWENRT_OK;
}

// x += mlp(norm(x))
int mlp_block(const Linears& linear, const QwenrtLayer& l, int64_t tokens, const Buffers& b, float* x) {
  const int64_t hidden = l.qkv.in_features;
  if (const int status = qwenrt_rms_norm(linear.with, x, l.post_norm, b.normed, tokens, hidden, l.eps)) return status;
  if (l.experts) return add_experts(linear, *l.experts, b.normed, b.product, x, tokens, hidden, b.mlp);
  if (const int status = run_mlp(linear, l.gate_up, l.down, b.normed, b.product, tokens, b.mlp)) return status;
  add(x, b.product, tokens * hidden);
  return QWENRT_OK;
}

// The logits of the tokens that are asked for.
int logits_of(const Linears& linear, const QwenrtHead& head, const QwenrtStep& step, const Buffers& b,
              const float* x, float* logits) {
  const int64_t hidden = head.linear.in_features;
  for (int64_t i = 0; i < step.logit_row_count; ++i) {
    const float* const row = x + step.logit_rows[i] * hidden;
    if (const int status = qwenrt_rms_norm(linear.with, row, head.norm, b.normed + i * hidden, 1, hidden, head.eps))
      return status;
  }
  return linear(head.linear, b.normed, logits, step.logit_row_count);
}

}  // namespace

int qwenrt_forward(const QwenrtHandle* with, const QwenrtLayer* layers, const QwenrtCache* caches, int64_t count,
                   const QwenrtHead* head, const QwenrtStep* step, float* x, float* logits) {
  if (step->tokens < 1 || count < 1 || step->logit_row_count > step->tokens) return QWENRT_BAD_ARGUMENT;
  if (step->logit_row_count && (!head || !logits)) return QWENRT_BAD_ARGUMENT;
  PoolLock lock(with->threads);
  Buffers buffers;
  if (!make_room(layers, count, step->tokens, buffers)) return QWENRT_NO_MEMORY;
  const Linears linear{with, step->instead, step->loras, step->lora_count};
  for (int64_t i = 0; i < count; ++i) {
    if (layers[i].delta && !step->state_slots) return QWENRT_BAD_ARGUMENT;
    if (const int status = mixer_block(linear, layers[i], *step, caches[i], buffers, x)) return status;
    if (const int status = mlp_block(linear, layers[i], step->tokens, buffers, x)) return status;
  }
  const Linears plain{with, step->instead, nullptr, 0};  // an adapter's tokens are not the head's rows
  return step->logit_row_count ? logits_of(plain, *head, *step, buffers, x, logits) : QWENRT_OK;
}
