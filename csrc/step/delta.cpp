// A layer of linear attention: shares the convolution by tokens and channels, then the delta rule by sequences and heads.
#include <string.h>

#include "abi/dispatch.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

constexpr int64_t kConvWork = 32;      // multiply-adds that a channel's taps and its exponential are worth
constexpr int64_t kChannelsAtOnce = 1024;
constexpr int64_t kMostTaps = 8;

struct DeltaTask {
  const QwenrtDeltaNet* a;
  const QwenrtSequences* sequences;
  const LayerKernels* kernels;
  int64_t tokens, channels, pieces, tasks;

  int64_t values() const { return a->value_heads * a->value_dim; }
  float* conv_state(int64_t slot) const { return a->conv_states + slot * (a->taps - 1) * channels; }
  float* delta_state(int64_t slot, int64_t head) const {
    return a->delta_states + (slot * a->value_heads + head) * a->key_dim * a->value_dim;
  }
  // How many of a sequence's tokens come before those whose states are left in slots of their own.
  int64_t own_tokens(int64_t s) const {
    int64_t own = sequences->q_lens[s];
    while (a->trail && own > 1 && a->trail[sequences->first_tokens[s] + own - 1] >= 0) --own;
    return own;
  }
  bool begins(int64_t s) const { return sequences->kv_lens[s] == sequences->q_lens[s]; }
  const float* row(int64_t token) const { return a->projected + token * (channels + values()); }
};

// The inputs of a token's taps: rows of this step, the state's, or zeros.
void inputs_of(const DeltaTask& t, int64_t s, int64_t j, const float* zeros, const float** inputs) {
  const int64_t before = t.a->taps - 1, first = t.sequences->first_tokens[s];
  for (int64_t tap = 0; tap <= before; ++tap) {
    const int64_t at = j - before + tap;
    inputs[tap] = at >= 0 ? t.row(first + at) : t.begins(s) ? zeros : t.conv_state(t.a->slots[s]) + (at + before) * t.channels;
  }
}

struct ConvTask {
  DeltaTask net;
  const float* zeros;
};

void conv_task(void* context, int64_t i) {
  const ConvTask& c = *static_cast<const ConvTask*>(context);
  const DeltaTask& t = c.net;
  const int64_t units = t.tokens * t.pieces;
  int64_t s = 0;
  for (int64_t unit = units * i / t.tasks; unit < units * (i + 1) / t.tasks; ++unit) {
    const int64_t token = unit / t.pieces, piece = unit % t.pieces;
    while (token >= t.sequences->first_tokens[s] + t.sequences->q_lens[s]) ++s;
    const float* inputs[kMostTaps];
    inputs_of(t, s, token - t.sequences->first_tokens[s], c.zeros, inputs);
    const int64_t first = piece * kChannelsAtOnce, end = first + kChannelsAtOnce;
    t.kernels->convolve(inputs, t.a->conv, t.a->taps, t.channels, first, end < t.channels ? end : t.channels,
                        t.a->mixed + token * t.channels);
  }
}

// The last inputs of a sequence after `count` tokens of this step, in `slot`, for a next one.
void keep_inputs(const DeltaTask& t, int64_t s, int64_t count, int64_t slot) {
  const int64_t before = t.a->taps - 1, first = t.sequences->first_tokens[s];
  const size_t bytes = size_t(t.channels) * sizeof(float);
  const float* state = t.conv_state(t.a->slots[s]);
  for (int64_t n = 0; n < before; ++n) {  // rising: in its own slot, what is read lies behind what is written
    const int64_t at = count - before + n;
    float* target = t.conv_state(slot) + n * t.channels;
    if (at >= 0)
      memcpy(target, t.row(first + at), bytes);
    else if (t.begins(s))
      memset(target, 0, bytes);
    else
      memmove(target, state + (at + before) * t.channels, bytes);
  }
}

void head_task(void* context, int64_t i) {
  const DeltaTask& t = *static_cast<const DeltaTask*>(context);
  const int64_t s = i / t.a->value_heads, head = i % t.a->value_heads, count = t.sequences->q_lens[s];
  if (!count) return;
  const int64_t first = t.sequences->first_tokens[s], own = t.own_tokens(s);
  const size_t bytes = size_t(t.a->key_dim * t.a->value_dim) * sizeof(float);
  float* state = t.delta_state(t.a->slots[s], head);
  if (t.begins(s)) memset(state, 0, bytes);
  t.kernels->delta_head(*t.a, head, first, own, state);
  for (int64_t j = own; j < count; ++j) {
    float* next = t.delta_state(t.a->trail[first + j], head);
    memcpy(next, state, bytes);
    t.kernels->delta_head(*t.a, head, first + j, 1, state = next);
  }
  if (head) return;
  for (int64_t j = own; j < count; ++j) keep_inputs(t, s, j + 1, t.a->trail[first + j]);
  keep_inputs(t, s, own, t.a->slots[s]);  // last: the others were made from it
}

}  // namespace

int qwenrt_delta_net(const QwenrtHandle* with, const QwenrtDeltaNet* a, const QwenrtSequences* sequences) {
  if (a->key_heads < 1 || a->value_heads % a->key_heads || a->key_dim < 1 || a->key_dim > 256 || a->value_dim < 8 ||
      a->value_dim > 256 || a->value_dim % 8 || a->taps < 2 || a->taps > kMostTaps)
    return QWENRT_BAD_ARGUMENT;
  int64_t tokens = 0;
  for (int64_t s = 0; s < sequences->count; ++s) tokens += sequences->q_lens[s];
  if (!tokens) return QWENRT_OK;
  PoolLock lock(with->threads);
  DeltaTask t{a, sequences, layer_kernels(*with), tokens, 0, 1, 1};
  t.channels = 2 * a->key_heads * a->key_dim + t.values();
  t.pieces = (t.channels + kChannelsAtOnce - 1) / kChannelsAtOnce;
  static Scratch scratch;
  ConvTask conv{t, nullptr};
  float* zeros;
  if (!scratch.room(array(zeros, t.channels))) return QWENRT_NO_MEMORY;
  memset(zeros, 0, size_t(t.channels) * sizeof(float));
  conv.zeros = zeros;
  conv.net.tasks = layer_tasks(tokens * t.pieces, tokens * t.channels * kConvWork);
  parallel_for(conv.net.tasks, conv_task, &conv);
  parallel_for(sequences->count * a->value_heads, head_task, &t);
  return QWENRT_OK;
}
