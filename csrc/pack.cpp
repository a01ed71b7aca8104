// Codes into the words of QwenrtQuantMatrix.
#include <string.h>

#include "kernels.h"
#include "thread_pool.h"

namespace {

struct PackTask {
  const uint8_t* codes;
  uint32_t* words;
  int64_t in_features, out_features, group_size, groups;
  int bits;
};

constexpr int64_t kPackBlocks = 8;  // blocks packed together: their codes of one input fill a cache line

void run_pack_task(void* context, int64_t i) {
  const PackTask& t = *static_cast<const PackTask*>(context);
  const int64_t per_word = 32 / t.bits, per_group = (t.group_size + per_word - 1) / per_word;
  const int64_t first = i * kPackBlocks * QWENRT_BLOCK;
  const int64_t rest = t.out_features - first;
  const int64_t rows = rest < kPackBlocks * QWENRT_BLOCK ? rest : kPackBlocks * QWENRT_BLOCK;
  for (int64_t word = 0; word < t.groups * per_group; ++word) {
    const int64_t in_group = word % per_group * per_word;
    const int64_t k = word / per_group * t.group_size + in_group;
    int64_t places = t.group_size - in_group < t.in_features - k ? t.group_size - in_group : t.in_features - k;
    if (places > per_word) places = per_word;
    uint32_t line[kPackBlocks * QWENRT_BLOCK] = {};
    for (int64_t j = 0; j < places; ++j) {
      const uint8_t* codes = t.codes + (k + j) * t.out_features + first;
      for (int64_t r = 0; r < rows; ++r) line[r] |= uint32_t(codes[r]) << (t.bits * j);
    }
    for (int64_t r = 0; r < rows; r += QWENRT_BLOCK) {
      const int64_t block = (first + r) / QWENRT_BLOCK;
      memcpy(t.words + (block * t.groups * per_group + word) * QWENRT_BLOCK, line + r, sizeof(uint32_t) * QWENRT_BLOCK);
    }
  }
}

}  // namespace

int qwenrt_pack(const uint8_t* codes, uint32_t* words, int64_t in_features, int64_t out_features, int64_t group_size,
                int bits) {
  if ((bits != 4 && bits != 8) || group_size < 1) return QWENRT_BAD_ARGUMENT;
  PackTask task{codes, words, in_features, out_features, group_size, (in_features + group_size - 1) / group_size, bits};
  const int64_t rows = kPackBlocks * QWENRT_BLOCK;
  parallel_for((out_features + rows - 1) / rows, run_pack_task, &task);
  return QWENRT_OK;
}
