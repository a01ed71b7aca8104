// A mixture of experts: who goes to whom, and the sums in an order that no batch changes.
#include "step/experts.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "abi/dispatch.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

struct Scored {
  float score;
  int32_t expert;
};

// NaN is the largest, as torch.topk has it.
bool better(const Scored& a, const Scored& b) {
  return (a.score != a.score && b.score == b.score) || a.score > b.score;
}

struct Buffers {
  Scored* scores;   // [tokens][count]; when chosen, the first top_k of each token are its experts and their weights
  float* gathered;  // [tokens][hidden]
  float* total;     // [tokens][hidden]
  int32_t* tokens;  // [tokens]: those of one expert
  float* weights;   // [tokens]
};

Scratch scratch;

bool make_room(int64_t tokens, int64_t hidden, int64_t count, Buffers& b) {
  return scratch.room(array(b.scores, tokens * count), array(b.gathered, tokens * hidden),
                      array(b.total, tokens * hidden), array(b.tokens, tokens), array(b.weights, tokens));
}

constexpr int kLanes = 16;  // sums side by side, for the compiler's vectors

float dot(const float* a, const float* b, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) sums[i % kLanes] += a[i] * b[i];
  for (int width = kLanes / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

struct RouteTask {
  const QwenrtExperts* e;
  const float* x;
  Scored* scores;
  int64_t tokens, hidden;
  Shares shares;  // of experts
};

// The scores of a share of the experts: each row of the router is read once.
void score_task(void* context, int64_t i) {
  const RouteTask& t = *static_cast<const RouteTask*>(context);
  const int64_t count = t.e->count;
  for (int64_t expert = t.shares.begin(i); expert < t.shares.begin(i + 1); ++expert)
    for (int64_t token = 0; token < t.tokens; ++token)
      t.scores[token * count + expert] = {dot(t.x + token * t.hidden, t.e->router + expert * t.hidden, t.hidden),
                                          int32_t(expert)};
}

// One token's scores to the weights of its experts.
void choose_task(void* context, int64_t token) {
  const RouteTask& t = *static_cast<const RouteTask*>(context);
  const int64_t count = t.e->count, k = t.e->top_k;
  Scored* const begin = t.scores + token * count;
  Scored* const end = begin + count;
  float most = -INFINITY, sum = 0;
  for (const Scored* s = begin; s < end; ++s) most = s->score > most ? s->score : most;
  for (Scored* s = begin; s < end; ++s) sum += s->score = expf(s->score - most);
  for (Scored* s = begin; s < end; ++s) s->score /= sum;
  // The steps of torch.topk, so that equal scores fall as they do there.
  if (k * 64 <= count) {
    std::partial_sort(begin, begin + k, end, better);
  } else {
    std::nth_element(begin, begin + k - 1, end, better);
    std::sort(begin, begin + k - 1, better);
  }
  if (!t.e->norm_topk_prob) return;
  float kept = 0;
  for (int64_t i = 0; i < k; ++i) kept += begin[i].score;
  for (int64_t i = 0; i < k; ++i) begin[i].score /= kept;
}

constexpr int64_t kTokensWorthWaking = 8;

void route(const QwenrtExperts& e, const float* x, Scored* scores, int64_t tokens, int64_t hidden) {
  RouteTask task{&e, x, scores, tokens, hidden, shares_of(e.count, e.count * hidden * tokens)};
  parallel_for(task.shares.count, score_task, &task);
  if (tokens >= kTokensWorthWaking) parallel_for(tokens, choose_task, &task);
  else
    for (int64_t token = 0; token < tokens; ++token) choose_task(&task, token);
}

// total[i] += weight * y[i], each product rounded by itself.
void add_weighted(const float* y, float weight, float* total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += weight * y[i];
}

// One expert over the tokens that chose it.
int add_expert(const Linears& linear, const QwenrtExperts& e, int64_t expert, const float* normed, float* y,
               const Buffers& b, int64_t tokens, int64_t hidden, const MlpBuffers& mlp) {
  int64_t n = 0;
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t rank = 0; rank < e.top_k; ++rank)
      if (b.scores[token * e.count + rank].expert == expert) {
        b.tokens[n] = int32_t(token);
        b.weights[n++] = b.scores[token * e.count + rank].score;
      }
  if (!n) return QWENRT_OK;
  const float* rows = normed;
  if (n < tokens) {
    rows = b.gathered;
    for (int64_t i = 0; i < n; ++i)
      memcpy(b.gathered + i * hidden, normed + b.tokens[i] * hidden, size_t(hidden) * sizeof(float));
  }
  if (const int status = run_mlp(linear, e.gate_up[expert], e.down[expert], rows, y, n, mlp)) return status;
  for (int64_t i = 0; i < n; ++i) add_weighted(y + i * hidden, b.weights[i], b.total + b.tokens[i] * hidden, hidden);
  return QWENRT_OK;
}

}  // namespace

int run_mlp(const Linears& linear, const QwenrtLinear& gate_up, const QwenrtLinear& down, const float* x, float* y,
            int64_t tokens, const MlpBuffers& b) {
  if (const int status = linear(gate_up, x, b.gate_up, tokens)) return status;
  const int64_t inner = gate_up.out_features / 2;
  if (const int status = qwenrt_silu_and_mul(linear.with, b.gate_up, b.inner, tokens, inner)) return status;
  return linear(down, b.inner, y, tokens);
}

int add_experts(const Linears& linear, const QwenrtExperts& e, const float* normed, float* y, float* out,
                int64_t tokens, int64_t hidden, const MlpBuffers& mlp) {
  if (e.top_k < 1 || e.top_k > e.count || e.count > INT32_MAX || tokens > INT32_MAX) return QWENRT_BAD_ARGUMENT;
  Buffers b;
  if (!make_room(tokens, hidden, e.count, b)) return QWENRT_NO_MEMORY;
  route(e, normed, b.scores, tokens, hidden);
  memset(b.total, 0, size_t(tokens * hidden) * sizeof(float));
  for (int64_t expert = 0; expert < e.count; ++expert)
    if (const int status = add_expert(linear, e, expert, normed, y, b, tokens, hidden, mlp)) return status;
  if (e.shared_gate) {
    if (const int status = run_mlp(linear, e.gate_up[e.count], e.down[e.count], normed, y, tokens, mlp)) return status;
    for (int64_t t = 0; t < tokens; ++t) {
      const float gate = 1 / (1 + expf(-dot(normed + t * hidden, e.shared_gate, hidden)));
      add_weighted(y + t * hidden, gate, b.total + t * hidden, hidden);
    }
  }
  for (int64_t i = 0; i < tokens * hidden; ++i) out[i] += b.total[i];
  return QWENRT_OK;
}
