// Floats and Words of linear/linear_body.h for NEON: the 8 rows of one block in two registers.
#pragma once
#include "isa/linear_kernels.h"
#include "isa/unroll.h"
#include "isa/vector.h"

namespace {

using Floats = Vec;
struct Words {
  uint32x4_t low, high;
};

constexpr int kBlocks = 1;
constexpr int kMostChains = 2;
constexpr int kVectors16 = 1;
template <int TILE>
constexpr int kDenseRows = TILE == 4 ? 2 : 4;  // beside 4 tokens, 16 of the 32 registers hold sums

// The tokens of the next tile of a dense linear.
INLINE int64_t dense_tile_of(int64_t tokens) { return tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1; }

INLINE Floats subtract_product(Floats c, Floats a, Floats b) {
  return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}

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

template <bool HALF, int N>
INLINE void load16(const uint16_t* p, Floats (&values)[N]) {
  UNROLL(N, i, { values[i] = load16<HALF>(p + 8 * i); });
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
  const bool in_scales = !w.zeros && w.zero == QWENRT_ZEROS_IN_SCALES;
  if (!w.zeros && !in_scales) return all(float(w.zero));
  if (!in_scales && w.zeros_are_float) return load(static_cast<const float*>(w.zeros) + at[0]);
  const uint16_t* const from = static_cast<const uint16_t*>(in_scales ? w.scales : w.zeros);
  uint16x8_t zeros = vld1q_u16(from + at[0]);
  if (in_scales) zeros = vandq_u16(zeros, vdupq_n_u16(15));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(zeros))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(zeros)))};
}

INLINE void load_scales_and_zeros(const QwenrtQuantMatrix& w, const int64_t* at, Floats* scale, Floats* zero) {
  *scale = load_scales(w, at);
  *zero = load_zeros(w, at);
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

// ---- integers, of linear/integer_body.h: bytes are multiplied signed, so 8-bit codes become code - 128

struct Ints {
  int32x4_t low, high;
};
constexpr bool kSignedCodes = true;

INLINE Words all_words(int32_t x) { return {vdupq_n_u32(uint32_t(x)), vdupq_n_u32(uint32_t(x))}; }
INLINE Ints all_ints(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
INLINE Ints add(Ints a, Ints b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
INLINE Ints times_256(Ints a) { return {vshlq_n_s32(a.low, 8), vshlq_n_s32(a.high, 8)}; }
INLINE Floats to_floats(Ints a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }

template <int BITS, int P>
INLINE uint32x4_t four_bytes_at(uint32x4_t word) {
  if constexpr (BITS == 8) return veorq_u32(word, vdupq_n_u32(0x80808080));
  else if constexpr (P > 0) return vandq_u32(vshrq_n_u32(word, 4 * P), vdupq_n_u32(0x0f0f0f0f));
  else return vandq_u32(word, vdupq_n_u32(0x0f0f0f0f));
}
template <int BITS, int P>
INLINE Words bytes_at(Words word) {
  return {four_bytes_at<BITS, P>(word.low), four_bytes_at<BITS, P>(word.high)};
}
INLINE int8x16_t bytes(uint32x4_t a) { return vreinterpretq_s8_u32(a); }

#if defined(__ARM_FEATURE_DOTPROD)

constexpr int kStreams1 = 4, kStreams2 = 4, kStreams4 = 2;  // at most 16 of the 32 registers hold sums

template <int BITS>
struct Products {
  Ints sums;
};
template <int BITS>
INLINE void clear(Products<BITS>& p) { p.sums = all_ints(0); }
template <int BITS>
INLINE void add_products(Products<BITS>& p, Words codes, Words x) {
  p.sums.low = vdotq_s32(p.sums.low, bytes(codes.low), bytes(x.low));
  p.sums.high = vdotq_s32(p.sums.high, bytes(codes.high), bytes(x.high));
}
template <int BITS>
INLINE Ints total_of(const Products<BITS>& p) { return p.sums; }

#else

constexpr int kStreams1 = 4, kStreams2 = 2, kStreams4 = 1;

// With 4-bit codes, a block's 8 products of at most 15 * 128 fit in int16; with 8-bit ones each two go on to int32.
static_assert(kByteBlock / 4 * 15 * 128 < 32768, "sums of a block fit in int16");
template <int BITS>
struct Products;
template <>
struct Products<4> {
  int16x8_t sums[4];
};
template <>
struct Products<8> {
  int32x4_t sums[4];
};
INLINE void clear(Products<4>& p) { p.sums[0] = p.sums[1] = p.sums[2] = p.sums[3] = vdupq_n_s16(0); }
INLINE void clear(Products<8>& p) { p.sums[0] = p.sums[1] = p.sums[2] = p.sums[3] = vdupq_n_s32(0); }

INLINE int16x8_t add_halves(int16x8_t sum, int8x8_t codes, int8x8_t x) { return vmlal_s8(sum, codes, x); }
INLINE int32x4_t add_halves(int32x4_t sum, int8x8_t codes, int8x8_t x) { return vpadalq_s16(sum, vmull_s8(codes, x)); }
template <int BITS>
INLINE void add_products(Products<BITS>& p, Words codes, Words x) {
  const int8x8_t xs = vget_low_s8(bytes(x.low));
  p.sums[0] = add_halves(p.sums[0], vget_low_s8(bytes(codes.low)), xs);
  p.sums[1] = add_halves(p.sums[1], vget_high_s8(bytes(codes.low)), xs);
  p.sums[2] = add_halves(p.sums[2], vget_low_s8(bytes(codes.high)), xs);
  p.sums[3] = add_halves(p.sums[3], vget_high_s8(bytes(codes.high)), xs);
}
INLINE Ints total_of(const Products<8>& p) {
  return {vpaddq_s32(p.sums[0], p.sums[1]), vpaddq_s32(p.sums[2], p.sums[3])};
}
INLINE Ints total_of(const Products<4>& p) {
  return {vpaddq_s32(vpaddlq_s16(p.sums[0]), vpaddlq_s16(p.sums[1])),
          vpaddq_s32(vpaddlq_s16(p.sums[2]), vpaddlq_s16(p.sums[3]))};
}

#endif

// sums[t] += the bytes of every TILE-th of x [n].
template <int TILE>
INLINE void add_byte_sums(const int32_t* x, int64_t n, int32_t (&sums)[TILE]) {
  int32x4_t total = vdupq_n_s32(0);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    total = vpadalq_s16(total, vpaddlq_s8(vreinterpretq_s8_s32(vld1q_s32(x + i))));
  int32_t lanes[4];
  vst1q_s32(lanes, total);
  for (int j = 0; j < 4; ++j) sums[j % TILE] += lanes[j];
  for (; i < n; ++i)
    for (int b = 0; b < 32; b += 8) sums[i % TILE] += int8_t(uint32_t(x[i]) >> b);
}

INLINE void round8(const float* x, float inverse, int32_t* q) {
  vst1q_s32(q, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), inverse)));
  vst1q_s32(q + 4, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4), inverse)));
}

}  // namespace
