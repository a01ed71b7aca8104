// Norm, rotary with its store, and silu, one row at a time over isa/vector.h. Rounding is the definition's: products
// and sums that it rounds one by one are not fused.
#pragma once
#include "isa/layer_kernels.h"
#include "isa/vector.h"

namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t dim, float* out) {
  Vec squares[2] = {all(0), all(0)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes)
    for (int n = 0; n < 2; ++n) {
      const Vec value = load(x + i + n * kLanes);
      squares[n] = multiply_add(value, value, squares[n]);
    }
  float total = sum(add(squares[0], squares[1]));
  for (; i < dim; ++i) total += x[i] * x[i];
  const float factor = 1.0f / square_root(total / float(dim) + eps);
  for (i = 0; i + kLanes <= dim; i += kLanes) store(out + i, mul(mul(load(x + i), all(factor)), load(weight + i)));
  for (; i < dim; ++i) out[i] = x[i] * factor * weight[i];
}

INLINE Vec silu_times(Vec gate, Vec up) {
  return mul(div(gate, add(all(1.0f), exponential(sub(all(0.0f), gate)))), up);
}

void silu_and_mul(const float* gate, const float* up, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, silu_times(load(gate + i), load(up + i)));
  if (i == count) return;
  float lanes[2][kLanes] = {};
  const size_t rest = size_t(count - i) * sizeof(float);
  memcpy(lanes[0], gate + i, rest);
  memcpy(lanes[1], up + i, rest);
  store(lanes[0], silu_times(load(lanes[0]), load(lanes[1])));
  memcpy(out + i, lanes[0], rest);
}

// x times sigmoid(gate); out may be x.
INLINE Vec gated(Vec x, Vec gate) {
  return mul(x, div(all(1.0f), add(all(1.0f), exponential(sub(all(0.0f), gate)))));
}

void gate_output(const float* x, const float* gate, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, gated(load(x + i), load(gate + i)));
  if (i == count) return;
  float lanes[2][kLanes] = {};
  const size_t rest = size_t(count - i) * sizeof(float);
  memcpy(lanes[0], x + i, rest);
  memcpy(lanes[1], gate + i, rest);
  store(lanes[0], gated(load(lanes[0]), load(lanes[1])));
  memcpy(out + i, lanes[0], rest);
}

// Blocks are summed in double: a vocabulary has many small terms beside a few large ones.
double sum_exponentials(const float* x, int64_t count, float most, float temperature) {
  constexpr int64_t kBlock = 512;
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= count) {
    const int64_t end = count - i < kBlock ? count : i + kBlock;
    Vec part = all(0);
    for (; i + kLanes <= end; i += kLanes)
      part = add(part, exponential(div(sub(load(x + i), all(most)), all(temperature))));
    total += double(sum(part));
  }
  float lanes[kLanes];
  for (float& lane : lanes) lane = -infinity();
  memcpy(lanes, x + i, size_t(count - i) * sizeof(float));
  return total + double(sum(exponential(div(sub(load(lanes), all(most)), all(temperature)))));
}

// The halves of the first `dim` channels turned against each other; the rest copied. x may be out.
void rotate(const float* x, const float* cos, const float* sin, int64_t dim, int64_t head_dim, float* out) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(x + half + i);
    store(out + i, sub(mul(a, load(cos + i)), mul(b, load(sin + i))));
    store(out + half + i, add(mul(b, load(cos + half + i)), mul(a, load(sin + half + i))));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    out[i] = a * cos[i] - b * sin[i];
    out[half + i] = b * cos[half + i] + a * sin[half + i];
  }
  if (x != out && dim < head_dim) memcpy(out + dim, x + dim, size_t(head_dim - dim) * sizeof(float));
}

// One head's row -> codes with scale = (max - min) / 255 and zero = min. What is not finite makes both NaN.
void quantize_row(const float* x, int64_t head_dim, uint8_t* codes, float* scale, float* zero) {
  Vec most = all(-infinity()), least = all(infinity()), poison = all(0);
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const Vec value = load(x + c);
    most = larger(value, most);
    least = smaller(value, least);
    poison = add(poison, mul(value, all(0)));  // NaN where a value is NaN or infinite
  }
  const float tainted = sum(poison), low = -largest(sub(all(0), least)) + tainted;
  *scale = (largest(most) - low) / 255;
  *zero = low;
  const float step = *scale > 0 ? *scale : 1.0f;
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    float lanes[kLanes];
    const Vec code = nearest(div(sub(load(x + c), all(low)), all(step)));
    store(lanes, smaller(larger(code, all(0)), all(255)));
    for (int i = 0; i < kLanes; ++i) codes[c + i] = uint8_t(lanes[i]);
  }
}

void store_rows(const float* x, int64_t slot, const QwenrtCache& cache, void* target, float* scale, float* zero) {
  const int64_t dim = cache.head_dim, heads = cache.num_kv_heads, cell = slot * heads;
  if (!scale) {
    memcpy(static_cast<float*>(target) + cell * dim, x, size_t(heads * dim) * sizeof(float));
    return;
  }
  for (int64_t h = 0; h < heads; ++h)
    quantize_row(x + h * dim, dim, static_cast<uint8_t*>(target) + (cell + h) * dim, scale + cell + h, zero + cell + h);
}

// Rotated heads -> what a cache with factors takes of them: queries times the factor, keys less the offset over it.
void fit_to_codes(const QwenrtRotary& a, const QwenrtCache& cache, float* rotated) {
  const int64_t dim = a.head_dim, queries = a.num_heads * dim, shared = a.num_heads / a.num_kv_heads;
  for (int64_t h = 0; h < a.num_heads; ++h)
    for (int64_t c = 0; c < dim; c += kLanes) {
      float* x = rotated + h * dim + c;
      store(x, mul(load(x), load(cache.k_factor + h / shared * dim + c)));
    }
  for (int64_t c = 0; c < a.num_kv_heads * dim; c += kLanes) {
    float* x = rotated + queries + c;
    store(x, div(sub(load(x), load(cache.k_offset + c)), load(cache.k_factor + c)));
  }
}

void rotary_store(const QwenrtRotary& a, const QwenrtCache* cache, int64_t token) {
  const int64_t dim = a.head_dim, heads = a.num_heads + a.num_kv_heads, gates = a.gated ? a.num_heads : 0;
  const float* row = a.qkv + token * (gates + heads + a.num_kv_heads) * dim;
  const float *cos = a.cos + token * a.rotary_dim, *sin = a.sin + token * a.rotary_dim;
  float* rotated = a.qk + token * heads * dim;
  for (int64_t h = 0; h < heads; ++h) {
    const bool is_query = h < a.num_heads;
    const float *x = row + (h + (is_query && gates ? h : gates)) * dim, *norm = is_query ? a.q_norm : a.k_norm;
    float* out = rotated + h * dim;
    if (norm) {
      rms_norm(x, norm, a.eps, dim, out);
      x = out;
    }
    rotate(x, cos, sin, a.rotary_dim, dim, out);
    if (!is_query || !a.q_scale) continue;
    for (int64_t c = 0; c < dim; c += kLanes) store(out + c, mul(load(out + c), all(a.q_scale[token])));
  }
  if (cache && cache->k_factor) fit_to_codes(a, *cache, rotated);
  if (!cache || !a.slots || a.slots[token] < 0) return;
  store_rows(rotated + a.num_heads * dim, a.slots[token], *cache, cache->k, cache->k_scale, cache->k_zero);
  store_rows(row + (gates + heads) * dim, a.slots[token], *cache, cache->v, cache->v_scale, cache->v_zero);
}

}  // namespace
