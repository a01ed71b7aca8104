// Codes, one a byte or in the words of a GPTQ file, into the words of QwenrtQuantMatrix.
#include <string.h>

#include "abi/dispatch.h"
#include "pool/thread_pool.h"

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

struct RepackTask {
  const uint32_t* stored;
  const int32_t* perm;
  uint32_t* words;
  int64_t in_features, out_features, group_size, groups;
  int bits;
};

constexpr int64_t kRepackRows = 128;  // outputs repacked together: 512 bytes of each stored row, so that pages repay

// Where groups begin with a word and inputs keep their order, words stay whole and only change places.
void move_words(const RepackTask& t, int64_t first, int64_t rows, int64_t row_words) {
  for (int64_t word = 0; word < row_words; ++word) {
    const uint32_t* line = t.stored + word * t.out_features + first;
    int64_t r = 0;
    for (; r + QWENRT_BLOCK <= rows; r += QWENRT_BLOCK)
      memcpy(t.words + ((first + r) / QWENRT_BLOCK * row_words + word) * QWENRT_BLOCK, line + r,
             sizeof(uint32_t) * QWENRT_BLOCK);
    if (r == rows) continue;
    uint32_t rest[QWENRT_BLOCK] = {};
    memcpy(rest, line + r, sizeof(uint32_t) * size_t(rows - r));
    memcpy(t.words + ((first + r) / QWENRT_BLOCK * row_words + word) * QWENRT_BLOCK, rest, sizeof rest);
  }
}

template <int BITS>
void regroup_words(const RepackTask& t, int64_t first, int64_t rows, int64_t per_group) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr uint32_t kMask = (uint32_t(1) << BITS) - 1;
  for (int64_t word = 0; word < t.groups * per_group; ++word) {
    const int64_t in_group = word % per_group * PER_WORD;
    const int64_t k = word / per_group * t.group_size + in_group;
    int64_t places = t.group_size - in_group < t.in_features - k ? t.group_size - in_group : t.in_features - k;
    if (places > PER_WORD) places = PER_WORD;
    uint32_t line[kRepackRows] = {};
    for (int64_t j = 0; j < places; ++j) {
      const int64_t input = t.perm ? t.perm[k + j] : k + j;
      const uint32_t* from = t.stored + input / PER_WORD * t.out_features + first;
      const int shift = int(input % PER_WORD) * BITS, to = int(j) * BITS;
      for (int64_t r = 0; r < rows; ++r) line[r] |= (from[r] >> shift & kMask) << to;
    }
    for (int64_t r = 0; r < rows; r += QWENRT_BLOCK)
      memcpy(t.words + ((first + r) / QWENRT_BLOCK * t.groups * per_group + word) * QWENRT_BLOCK, line + r,
             sizeof(uint32_t) * QWENRT_BLOCK);
  }
}

void run_repack_task(void* context, int64_t i) {
  const RepackTask& t = *static_cast<const RepackTask*>(context);
  const int64_t per_word = 32 / t.bits, per_group = (t.group_size + per_word - 1) / per_word;
  const int64_t first = i * kRepackRows, rest = t.out_features - first;
  const int64_t rows = rest < kRepackRows ? rest : kRepackRows;
  const bool whole = t.in_features % per_word == 0 && (t.groups == 1 || t.group_size % per_word == 0) &&
                     t.groups * per_group * per_word == t.in_features;
  if (!t.perm && whole) {
    move_words(t, first, rows, t.groups * per_group);
  } else if (t.bits == 4) {
    regroup_words<4>(t, first, rows, per_group);
  } else {
    regroup_words<8>(t, first, rows, per_group);
  }
}

}  // namespace

int qwenrt_pack(const QwenrtHandle* with, const uint8_t* codes, uint32_t* words, int64_t in_features,
                int64_t out_features, int64_t group_size, int bits) {
  if ((bits != 4 && bits != 8) || group_size < 1) return QWENRT_BAD_ARGUMENT;
  PoolLock lock(with->threads);
  PackTask task{codes, words, in_features, out_features, group_size, (in_features + group_size - 1) / group_size, bits};
  const int64_t rows = kPackBlocks * QWENRT_BLOCK;
  parallel_for((out_features + rows - 1) / rows, run_pack_task, &task);
  return QWENRT_OK;
}

int qwenrt_repack(const QwenrtHandle* with, const uint32_t* stored, const int32_t* perm, uint32_t* words,
                  int64_t in_features, int64_t out_features, int64_t group_size, int bits) {
  if ((bits != 4 && bits != 8) || group_size < 1) return QWENRT_BAD_ARGUMENT;
  const int64_t groups = (in_features + group_size - 1) / group_size;
  PoolLock lock(with->threads);
  RepackTask task{stored, perm, words, in_features, out_features, group_size, groups, bits};
  parallel_for((out_features + kRepackRows - 1) / kRepackRows, run_repack_task, &task);
  return QWENRT_OK;
}
