// bfloat16 weights to 12 bits and back.
#include "linear/dense12.h"

#include <string.h>

#include <algorithm>

#include "abi/dispatch.h"
#include "pool/thread_pool.h"

#ifdef QWENRT_X86
#include <emmintrin.h>
#endif

namespace {

struct PackTask {
  const uint16_t* w;
  const QwenrtDense12* to;
  int32_t* first;
};

bool has_code(uint16_t weight, uint8_t smallest) { return uint8_t((weight >> 8 & 0x7f) - smallest) < 8; }

// Bytes of 16 neighbouring inputs to their places, of which `out` is the first: pairs that are eight inputs apart.
void place16(const uint8_t* bytes, uint8_t* out) {
#ifdef QWENRT_X86  // the compiler makes single bytes of it
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i pairs = _mm_unpacklo_epi8(all, _mm_srli_si128(all, 8));
#else
  uint8_t pairs[16];
  for (int i = 0; i < 8; ++i) pairs[2 * i] = bytes[i], pairs[2 * i + 1] = bytes[8 + i];
#endif
  memcpy(out, &pairs, 8);
  memcpy(out + byte_of(4), reinterpret_cast<const uint8_t*>(&pairs) + 8, 8);
}

// 64 weights to a chunk. Returns how many of them have no code. Loops in the order of the inputs, for the compiler's
// vectors; bytes move last.
int64_t pack_chunk(uint8_t smallest, const uint16_t* w, uint8_t* chunk) {
  constexpr int64_t HALF = QWENRT_CHUNK / 2;
  uint8_t codes[QWENRT_CHUNK], lower[QWENRT_CHUNK], both[HALF];
  uint16_t rare = 0;
  for (int64_t i = 0; i < QWENRT_CHUNK; ++i) {
    const uint16_t above = uint16_t((w[i] >> 8 & 0x7f) - smallest), known = above < 8 ? 0xff : 0;
    codes[i] = uint8_t((above | (w[i] >> 15) << 3) & known);
    lower[i] = uint8_t(w[i] & known);
    rare = uint16_t(rare + (known ^ 0xff));
  }
  for (int64_t i = 0; i < HALF; ++i) both[i] = uint8_t(codes[i] | codes[HALF + i] << 4);
  for (int64_t i = 0; i < QWENRT_CHUNK; i += 16) place16(lower + i, chunk + HALF + byte_of(i));
  for (int64_t i = 0; i < HALF; i += 16) place16(both + i, chunk + byte_of(i));
  return rare / 0xff;
}

void run_pack_task(void* context, int64_t row) {
  const PackTask& t = *static_cast<const PackTask*>(context);
  const int64_t inputs = t.to->in_features, chunks = chunks_of(*t.to), whole = inputs / QWENRT_CHUNK;
  const uint16_t* const w = t.w + row * inputs;
  const uint8_t smallest = uint8_t(t.to->smallest);
  uint8_t* const out = const_cast<uint8_t*>(t.to->chunks) + row * chunks * QWENRT_CHUNK_BYTES;
  int64_t rare = 0;
  for (int64_t c = 0; c < whole; ++c) rare += pack_chunk(smallest, w + c * QWENRT_CHUNK, out + c * QWENRT_CHUNK_BYTES);
  if (whole < chunks) {
    uint16_t last[QWENRT_CHUNK];
    std::fill(last, last + QWENRT_CHUNK, uint16_t(smallest << 8));
    memcpy(last, w + whole * QWENRT_CHUNK, size_t(inputs - whole * QWENRT_CHUNK) * sizeof *w);
    rare += pack_chunk(smallest, last, out + whole * QWENRT_CHUNK_BYTES);
  }
  t.first[row + 1] = int32_t(rare);
}

// What has no code in one row, to where `first` says.
void run_others_task(void* context, int64_t row) {
  const PackTask& t = *static_cast<const PackTask*>(context);
  int64_t at = t.first[row];
  if (at == t.first[row + 1]) return;
  const uint16_t* const w = t.w + row * t.to->in_features;
  for (int64_t i = 0; i < t.to->in_features; ++i) {
    if (has_code(w[i], uint8_t(t.to->smallest))) continue;
    const_cast<int32_t*>(t.to->inputs)[at] = int32_t(i);
    const_cast<uint16_t*>(t.to->weights)[at++] = w[i];
  }
}

struct UnpackTask {
  const Kernels* kernels;
  const QwenrtDense12* w;
  uint16_t* out;
  int64_t begin;
};

void run_unpack_task(void* context, int64_t i) {
  const UnpackTask& t = *static_cast<const UnpackTask*>(context);
  unpack_row(*t.kernels, *t.w, t.begin + i, t.out + i * t.w->in_features);
}

}  // namespace

void unpack_row(const Kernels& kernels, const QwenrtDense12& w, int64_t row, uint16_t* out) {
  if (kernels.unpack12) {
    kernels.unpack12(w, row, out);
  } else {
    const uint8_t* const chunks = w.chunks + row * chunks_of(w) * QWENRT_CHUNK_BYTES;
    for (int64_t i = 0; i < w.in_features; ++i) {
      const uint8_t* const chunk = chunks + i / QWENRT_CHUNK * QWENRT_CHUNK_BYTES;
      const int64_t byte = byte_of(i % QWENRT_CHUNK), half = QWENRT_CHUNK / 2;
      const int code = chunk[byte % half] >> (byte / half * 4) & 15;
      out[i] = uint16_t((code & 8) << 12 | (w.smallest + (code & 7)) << 8 | chunk[half + byte]);
    }
  }
  for (int64_t e = w.first[row]; e < w.first[row + 1]; ++e) out[w.inputs[e]] = w.weights[e];
}

int qwenrt_dense12_serves(const QwenrtHandle* with) { return linear_kernels(*with).dense12_rows != nullptr; }

int qwenrt_dense12_pack(const QwenrtHandle* with, const uint16_t* w, const QwenrtDense12* to) {
  if (to->smallest < 0 || to->smallest > 120) return QWENRT_BAD_ARGUMENT;
  PoolLock lock(with->threads);
  PackTask task{w, to, const_cast<int32_t*>(to->first)};
  task.first[0] = 0;
  parallel_for(to->out_features, run_pack_task, &task);
  int64_t before = 0;
  for (int64_t row = 1; row <= to->out_features; ++row) {
    before += task.first[row];
    if (before > INT32_MAX) return QWENRT_NOT_SERVED;
    task.first[row] = int32_t(before);
  }
  return QWENRT_OK;
}

int qwenrt_dense12_pack_others(const QwenrtHandle* with, const uint16_t* w, const QwenrtDense12* to) {
  PoolLock lock(with->threads);
  PackTask task{w, to, const_cast<int32_t*>(to->first)};
  parallel_for(to->out_features, run_others_task, &task);
  return QWENRT_OK;
}

int qwenrt_dense12_unpack(const QwenrtHandle* with, const QwenrtDense12* w, uint16_t* out, int64_t begin, int64_t end) {
  PoolLock lock(with->threads);
  UnpackTask task{&linear_kernels(*with), w, out, begin};
  parallel_for(end - begin, run_unpack_task, &task);
  return QWENRT_OK;
}
