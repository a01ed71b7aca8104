// Rounding of a dense matrix: reads its rows, shares them between the threads, and packs the codes into words.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "abi/dispatch.h"
#include "linear/half.h"
#include "pool/thread_pool.h"

namespace {

constexpr int64_t kRoundedRows = 16;  // outputs rounded together: their words of one input fill a cache line

struct RoundingTask {
  const QwenrtRounding& a;
  QuantizeGroup* quantize;
  std::atomic<int> status;
};

void read_weights(const QwenrtRounding& a, int64_t first, int64_t count, float* out) {
  const uint16_t* halves = static_cast<const uint16_t*>(a.weight) + first;
  if (a.dtype == QWENRT_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_bits(uint32_t(halves[i]) << 16);
  } else if (a.dtype == QWENRT_FLOAT16) {
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
  } else {
    memcpy(out, static_cast<const float*>(a.weight) + first, size_t(count) * sizeof(float));
  }
}

template <int BITS>
void pack_words(const uint8_t* codes, int64_t stride, int64_t rows, int64_t words, int64_t out_features,
                uint32_t* out) {
  constexpr int PER_WORD = 32 / BITS;
  for (int64_t word = 0; word < words; ++word, codes += PER_WORD, out += out_features)
    for (int64_t r = 0; r < rows; ++r) {
      uint32_t bits = 0;
      for (int j = 0; j < PER_WORD; ++j) bits |= uint32_t(codes[r * stride + j]) << (BITS * j);
      out[r] = bits;
    }
}

// codes [kRoundedRows][stride] and weights [padded] are memory to work in.
int round_rows(const RoundingTask& t, int64_t first, uint8_t* codes, int64_t stride, float* weights, int64_t padded) {
  const QwenrtRounding& a = t.a;
  const int64_t rest = a.out_features - first, rows = rest < kRoundedRows ? rest : kRoundedRows;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = codes + r * stride;
    for (int64_t k = 0, g = 0; k < a.in_features; k += a.group_size, ++g) {
      const int64_t inputs = a.in_features - k < a.group_size ? a.in_features - k : a.group_size;
      read_weights(a, (first + r) * a.in_features + k, inputs, weights);
      memset(weights + inputs, 0, size_t(padded - inputs) * sizeof(float));
      const int64_t at = g * a.out_features + first + r;
      float zero;
      // What it writes past the group is overwritten by the next one.
      if (!t.quantize(a, weights, padded, row + k, a.scales + at, &zero)) return QWENRT_NOT_FINITE;
      a.zeros[at] = int16_t(zero);
    }
    memset(row + a.in_features, 0, size_t(stride - a.in_features));
  }
  const int64_t per_word = 32 / a.bits, words = (a.in_features + per_word - 1) / per_word;
  const auto pack = a.bits == 4 ? pack_words<4> : pack_words<8>;
  pack(codes, stride, rows, words, a.out_features, a.words + first);
  return QWENRT_OK;
}

void run_rounding_task(void* context, int64_t i) {
  RoundingTask& t = *static_cast<RoundingTask*>(context);
  if (t.status != QWENRT_OK) return;
  const int64_t padded = (t.a.group_size + kSumLanes - 1) / kSumLanes * kSumLanes;
  const int64_t stride = t.a.in_features + padded;  // a group's codes are written whole, the last one's too
  uint8_t* codes = static_cast<uint8_t*>(malloc(size_t(stride * kRoundedRows)));
  float* weights = static_cast<float*>(malloc(size_t(padded) * sizeof(float)));
  const int status =
      codes && weights ? round_rows(t, i * kRoundedRows, codes, stride, weights, padded) : QWENRT_NO_MEMORY;
  free(codes);
  free(weights);
  if (status != QWENRT_OK) t.status = status;
}

}  // namespace

int qwenrt_quantize(const QwenrtHandle* with, const QwenrtRounding* a) {
  if ((a->bits != 4 && a->bits != 8) || a->group_size < 1 || a->num_clips < 1) return QWENRT_BAD_ARGUMENT;
  if (a->dtype < QWENRT_BFLOAT16 || a->dtype > QWENRT_FLOAT32) return QWENRT_BAD_ARGUMENT;
  PoolLock lock(with->threads);
  RoundingTask task{*a, with->set->quantize, {QWENRT_OK}};
  parallel_for((a->out_features + kRoundedRows - 1) / kRoundedRows, run_rounding_task, &task);
  return task.status;
}
