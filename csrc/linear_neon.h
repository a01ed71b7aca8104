// Floats and Words of linear_body.h for NEON: the 8 rows of one block in two registers.
#pragma once
#include "kernels.h"
#include "layer_vector.h"

namespace {

using Floats = Vec;
struct Words {
  uint32x4_t low, high;
};

constexpr int kBlocks = 1;
constexpr int kMostChains = 2;
constexpr int kDenseRows4 = 2;  // rows beside 4 tokens: 16 of the 32 registers hold sums

INLINE Words load_words(const uint32_t* const* blocks, int64_t offset) {
  return {vld1q_u32(blocks[0] + offset), vld1q_u32(blocks[0] + offset + 4)};
}

template <int BITS, int J>
INLINE float32x4_t four_codes_at(uint32x4_t word) {
  if constexpr (J == 32 / BITS - 1) return vcvtq_f32_u32(vshrq_n_u32(word, 32 - BITS));
  else return vcvtq_f32_u32(vandq_u32(word, vdupq_n_u32(((1u << BITS) - 1) << (BITS * J))));
}

template <int BITS, int J>
INLINE Floats code_at(Words word) {
  return {four_codes_at<BITS, J>(word.low), four_codes_at<BITS, J>(word.high)};
}

// Eight values of 16 bits: float16, or bfloat16.
template <bool HALF>
INLINE Floats load16(const uint16_t* p) {
  const uint16x4_t low = vld1_u16(p), high = vld1_u16(p + 4);
  if constexpr (HALF)
    return {vcvt_f32_f16(vreinterpret_f16_u16(low)), vcvt_f32_f16(vreinterpret_f16_u16(high))};
  else return {vreinterpretq_f32_u32(vshll_n_u16(low, 16)), vreinterpretq_f32_u32(vshll_n_u16(high, 16))};
}

template <bool HALF>
INLINE float value16(const uint16_t* p) {
  const uint16x4_t lanes = vdup_n_u16(*p);
  if constexpr (HALF) return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(lanes)), 0);
  else return vgetq_lane_f32(vreinterpretq_f32_u32(vshll_n_u16(lanes, 16)), 0);
}

INLINE Floats load_scales(const QwenrtQuantMatrix& w, const int64_t* at) {
  if (w.scales_are_float) return load(static_cast<const float*>(w.scales) + at[0]);
  return load16<true>(static_cast<const uint16_t*>(w.scales) + at[0]);
}

INLINE Floats load_zeros(const QwenrtQuantMatrix& w, const int64_t* at) {
  if (!w.zeros) return all(float(w.zero));
  const uint16x8_t zeros = vld1q_u16(w.zeros + at[0]);
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(zeros))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(zeros)))};
}

// A block's rows of one token, as many of them as there are.
INLINE void store_rows(const QwenrtQuantMatrix& w, float* y, Floats value, const int64_t* blocks) {
  const int64_t n = blocks[0] * QWENRT_BLOCK;
  if (n + QWENRT_BLOCK <= w.out_features) {
    store(y + n, w.bias ? add(value, load(w.bias + n)) : value);
    return;
  }
  float lanes[QWENRT_BLOCK];
  store(lanes, value);
  for (int64_t i = n; i < w.out_features; ++i) y[i] = w.bias ? lanes[i - n] + w.bias[i] : lanes[i - n];
}

}  // namespace
