// A gated delta net, one token of one head at a time over isa/vector.h: always in the same order, so that what a token
// reads does not depend on the tokens beside it.
#pragma once
#include <math.h>

#include "isa/layer_kernels.h"
#include "isa/vector.h"

namespace {

constexpr float kUnitEps = 1e-6f;       // of the lengths of queries and keys
constexpr int64_t kMostDim = 256;       // of a head
constexpr int kStrip = 4;               // vectors of a state's row that are summed together: 16 kB of 128 rows

INLINE Vec silu(Vec x) { return div(x, add(all(1.0f), exponential(sub(all(0.0f), x)))); }

void convolve(const float* const* inputs, const float* conv, int64_t taps, int64_t channels, int64_t first,
              int64_t last, float* out) {
  int64_t c = first;
  for (; c + kLanes <= last; c += kLanes) {
    Vec total = mul(load(inputs[0] + c), load(conv + c));
    for (int64_t j = 1; j < taps; ++j) total = add(total, mul(load(inputs[j] + c), load(conv + j * channels + c)));
    store(out + c, silu(total));
  }
  if (c == last) return;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < last - c; ++i) {
    float total = inputs[0][c + i] * conv[c + i];
    for (int64_t j = 1; j < taps; ++j) total += inputs[j][c + i] * conv[j * channels + c + i];
    lanes[i] = total;
  }
  store(lanes, silu(load(lanes)));
  memcpy(out + c, lanes, size_t(last - c) * sizeof(float));
}

float product(const float* x, const float* y, int64_t dim) {
  Vec total = all(0);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) total = multiply_add(load(x + i), load(y + i), total);
  float rest = sum(total);
  for (; i < dim; ++i) rest += x[i] * y[i];
  return rest;
}

// x [dim] times `factor` over its length.
void unit(const float* x, int64_t dim, float factor, float* out) {
  const float by = factor / square_root(product(x, x, dim) + kUnitEps);
  for (int64_t i = 0; i < dim; ++i) out[i] = x[i] * by;
}

// N vectors of each of the state's rows, which are `stride` apart: read twice, the second time from the nearest cache.
// d = beta (v - e^g S'k), out = e^g S'q + (k'q) d, S <- e^g S + k d'.
template <int N>
void strip(float* state, int64_t stride, int64_t key_dim, const float* q, const float* k, const float* v, float beta,
           float decay, float both, float* out) {
  Vec predicted[N], read[N], d[N];
  for (int n = 0; n < N; ++n) predicted[n] = read[n] = all(0);
  for (int64_t i = 0; i < key_dim; ++i) {
    const Vec key = all(k[i]), query = all(q[i]);
    for (int n = 0; n < N; ++n) {
      const Vec s = load(state + i * stride + n * kLanes);
      predicted[n] = multiply_add(key, s, predicted[n]);
      read[n] = multiply_add(query, s, read[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    d[n] = mul(all(beta), sub(load(v + n * kLanes), mul(all(decay), predicted[n])));
    store(out + n * kLanes, add(mul(all(decay), read[n]), mul(all(both), d[n])));
  }
  for (int64_t i = 0; i < key_dim; ++i) {
    const Vec key = all(k[i]);
    for (int n = 0; n < N; ++n) {
      float* const s = state + i * stride + n * kLanes;
      store(s, add(mul(all(decay), load(s)), mul(key, d[n])));
    }
  }
}

// o [dim], in its place: normed, times the weight, times silu(z).
void norm_and_gate(const float* z, const float* weight, float eps, int64_t dim, float* o) {
  const float factor = 1.0f / square_root(product(o, o, dim) / float(dim) + eps);
  for (int64_t i = 0; i < dim; i += kLanes)
    store(o + i, mul(mul(mul(load(o + i), all(factor)), load(weight + i)), silu(load(z + i))));
}

float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

void delta_head(const QwenrtDeltaNet& a, int64_t head, int64_t token, int64_t count, float* state) {
  const int64_t dk = a.key_dim, dv = a.value_dim, keys = a.key_heads * dk, values = a.value_heads * dv;
  const int64_t channels = 2 * keys + values, width = channels + values;
  const int64_t key_head = a.tiled ? head % a.key_heads : head / (a.value_heads / a.key_heads);
  const float rate = -expf(a.log_decay[head]), bias = a.decay_bias[head], scale = 1.0f / square_root(float(dk));
  float q[kMostDim], k[kMostDim];
  for (int64_t t = token; t < token + count; ++t) {
    const float* mixed = a.mixed + t * channels;
    const float* v = mixed + 2 * keys + head * dv;
    const float* rates = a.rates + t * 2 * a.value_heads;
    float* out = a.out + t * values + head * dv;
    unit(mixed + key_head * dk, dk, scale, q);
    unit(mixed + keys + key_head * dk, dk, 1.0f, k);
    const float beta = 1.0f / (1.0f + expf(-rates[head]));
    const float decay = expf(rate * softplus(rates[a.value_heads + head] + bias)), both = product(k, q, dk);
    int64_t c = 0;
    for (; c + kStrip * kLanes <= dv; c += kStrip * kLanes)
      strip<kStrip>(state + c, dv, dk, q, k, v + c, beta, decay, both, out + c);
    for (; c < dv; c += kLanes) strip<1>(state + c, dv, dk, q, k, v + c, beta, decay, both, out + c);
    norm_and_gate(a.projected + t * width + channels + head * dv, a.out_norm, a.eps, dv, out);
  }
}

}  // namespace
