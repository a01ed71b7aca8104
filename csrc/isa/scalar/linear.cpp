// Portable kernels: any CPU, and what the vector ones are compared with.
#include <math.h>
#include <string.h>

#include "linear/half.h"
#include "linear/integer_places.h"

namespace {

float scale_at(const QwenrtQuantMatrix& w, int64_t i) {
  return w.scales_are_float ? static_cast<const float*>(w.scales)[i]
                            : half_to_float(static_cast<const uint16_t*>(w.scales)[i]);
}

float zero_at(const QwenrtQuantMatrix& w, int64_t i) {
  if (w.zeros && w.zeros_are_float) return static_cast<const float*>(w.zeros)[i];
  if (w.zeros) return static_cast<const uint16_t*>(w.zeros)[i];
  return float(w.zero == QWENRT_ZEROS_IN_SCALES ? static_cast<const uint16_t*>(w.scales)[i] & 15 : w.zero);
}

void quant_rows(const QwenrtQuantMatrix& w, const QuantInput& in, float* y, int64_t begin, int64_t end) {
  const int bits = w.bits, per_word = 32 / bits;
  const int64_t group_inputs = w.words_per_group * per_word;
  for (int64_t n = begin * QWENRT_BLOCK; n < end * QWENRT_BLOCK && n < w.out_features; ++n) {
    const int64_t block = n / QWENRT_BLOCK, row = n % QWENRT_BLOCK;
    const uint32_t* words = w.words + block * w.groups * w.words_per_group * QWENRT_BLOCK + row;
    for (int64_t t = 0; t < in.tokens; ++t) {
      const int64_t tile = t / in.tile, lane = t % in.tile;
      const float* x = in.x + tile * in.padded * in.tile + lane;
      const float* sums = in.sums + tile * w.groups * in.tile + lane;
      float total = 0;
      for (int64_t g = 0; g < w.groups; ++g) {
        float part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int64_t i = 0; i < w.words_per_group; ++i) {
          const uint32_t word = words[(g * w.words_per_group + i) * QWENRT_BLOCK];
          const float* xs = x + (g * group_inputs + i * per_word) * in.tile;
          for (int j = 0; j < per_word; ++j) {
            const uint32_t in_place =
                j == per_word - 1 ? word >> (32 - bits) : word & (((1u << bits) - 1) << (bits * j));
            part[j] += float(in_place) * xs[j * in.tile];
          }
        }
        const float acc = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
        const int64_t s = (block * w.groups + g) * QWENRT_BLOCK + row;
        total += scale_at(w, s) * (acc - zero_at(w, s) * sums[g * in.tile]);
      }
      y[t * w.out_features + n] = w.bias ? total + w.bias[n] : total;
    }
  }
}

void dense16_rows(const DenseProduct& m, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 8;
  for (int64_t n = begin; n < end; ++n) {
    const uint16_t* row = m.w + n * m.in_features;
    for (int64_t first = 0; first < m.tokens; first += kTile) {
      const int64_t tile = m.tokens - first < kTile ? m.tokens - first : kTile;
      float part[kTile][4] = {};
      for (int64_t k = 0; k < m.in_features; ++k) {
        const float value = m.is_half ? half_to_float(row[k]) : from_bits(uint32_t(row[k]) << 16);
        for (int64_t t = 0; t < tile; ++t) part[t][k & 3] += value * m.x[(first + t) * m.in_features + k];
      }
      for (int64_t t = 0; t < tile; ++t) {
        const float sum = (part[t][0] + part[t][1]) + (part[t][2] + part[t][3]);
        m.y[(first + t) * m.out_features + n] = m.bias ? sum + m.bias[n] : sum;
      }
    }
  }
}

BlockKind round_block(const float* x, int64_t n, int bits, NarrowRule narrow, RoundedBlock& out) {
  float largest = 0, lanes[8] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = fabsf(x[i]);
    if (!(magnitude <= kLargestActivation)) return BlockKind::kNotFinite;  // NaN is not either
    if (magnitude > largest) largest = magnitude;
    lanes[i % 8] += magnitude;
  }
  const float total = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  const BlockScale block = scale_of(largest, total, n, narrow);
  out.scale = block.scale;
  int32_t q[kPairBlock], all = 0;
  for (int64_t i = 0; i < n; ++i) all += q[i] = int32_t(lrintf(x[i] * block.inverse));
  out.sum = all;
  if (block.wide) place_wide(q, n, bits, out.low, out.high);
  else place_bytes(q, n, bits, out.low);
  return block.wide ? BlockKind::kWide : BlockKind::kNarrow;
}

// Sum of codes * activations over words [0, count) of one row and one token, from `low` or from `high`.
int32_t block_product(const uint32_t* words, const int32_t* x, int64_t count, int bits, int64_t tile) {
  const int places = int(places_of(bits, 0));
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int p = 0; p < places; ++p, x += tile)
      for (int l = 0; l < 4; ++l) {
        const int32_t code = int32_t(words[i * QWENRT_BLOCK] >> (bits * (p + l * places)) & ((1u << bits) - 1));
        sum += code * int32_t(int8_t(uint32_t(*x) >> (8 * l)));
      }
  return sum;
}

void integer_rows(const QwenrtQuantMatrix& w, const IntegerInput& in, float* y, int64_t begin, int64_t end) {
  const int64_t places = places_of(w.bits, 0), blocks = w.groups * in.blocks_per_group;
  const int64_t row_words = w.groups * w.words_per_group;
  for (int64_t n = begin * QWENRT_BLOCK; n < end * QWENRT_BLOCK && n < w.out_features; ++n) {
    const int64_t block = n / QWENRT_BLOCK, row = n % QWENRT_BLOCK;
    const uint32_t* words = w.words + block * row_words * QWENRT_BLOCK + row;
    for (int64_t t = 0; t < in.tokens; ++t) {
      const int64_t tile = t / in.tile, lane = t % in.tile, first_x = tile * row_words * places * in.tile + lane;
      float total = 0;
      for (int64_t g = 0; g < w.groups; ++g) {
        float sum = 0;
        for (int64_t part = 0; part < in.blocks_per_group; ++part) {
          const int64_t skipped = part * in.words_per_block, rest = w.words_per_group - skipped;
          const int64_t word = g * w.words_per_group + skipped, at = tile * blocks + g * in.blocks_per_group + part;
          const int64_t count = rest < in.words_per_block ? rest : in.words_per_block;
          const int64_t x = first_x + word * places * in.tile;
          int32_t product = block_product(words + word * QWENRT_BLOCK, in.low + x, count, w.bits, in.tile);
          if (in.wide[at])
            product += 256 * block_product(words + word * QWENRT_BLOCK, in.high + x, count, w.bits, in.tile);
          sum = fmaf(in.scales[at * in.tile + lane], float(product), sum);
        }
        const int64_t s = (block * w.groups + g) * QWENRT_BLOCK + row;
        total = fmaf(scale_at(w, s), fmaf(-zero_at(w, s), in.sums[(tile * w.groups + g) * in.tile + lane], sum), total);
      }
      y[t * w.out_features + n] = w.bias ? total + w.bias[n] : total;
    }
  }
}

}  // namespace

const Kernels* scalar_kernels() {
  static const Kernels kernels = {"scalar", quant_rows, dense16_rows, round_block, integer_rows};
  return &kernels;
}
