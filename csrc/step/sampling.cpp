// The largest logits of a row. One thread: a pass takes less than waking a second one saves.
#include "abi/qwenrt_sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "abi/dispatch.h"

namespace {

constexpr int64_t kLanes = 16;   // independent maxima, which a compiler may keep in vectors
constexpr int64_t kBlock = 512;  // logits whose largest is found before anyone asks where it is

int64_t lanes_of(int64_t count) { return (count + kBlock - 1) / kBlock * kLanes; }

// The largest in each lane: of places i, i + kLanes, ...; NaN is nobody's.
void largest_by_lane(const float* x, int64_t count, float* most) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int64_t j = 0; i < count; ++i, ++j) lanes[j] = x[i] > lanes[j] ? x[i] : lanes[j];
  memcpy(most, lanes, sizeof lanes);
}

// Nothing times zero is zero unless it is infinite or NaN.
bool all_finite(const float* x, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j] * 0.0f;
  for (; i < count; ++i) sums[0] += x[i] * 0.0f;
  float total = 0;
  for (float lane : sums) total += lane;
  return total == 0;
}

// Sorts as the logit falls, then as the place rises: one number of both.
uint64_t rank_of(float logit, int64_t place) {
  logit += 0.0f;  // -0 equals 0
  uint32_t bits;
  memcpy(&bits, &logit, sizeof bits);
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(~rising) << 32 | uint64_t(place);
}

// A value that at least k of the logits reach, and few more: k lanes of blocks have a largest that does.
float reached_by(const float* logits, int64_t count, int64_t k, float* most) {
  const int64_t lanes = lanes_of(count);
  if (k > lanes) return -INFINITY;
  for (int64_t at = 0, lane = 0; at < count; at += kBlock, lane += kLanes)
    largest_by_lane(logits + at, std::min(kBlock, count - at), most + lane);
  std::nth_element(most, most + k - 1, most + lanes, [](float a, float b) { return a > b; });
  return most[k - 1];
}

// Ranks of the logits that reach `floor` -> how many these are.
int64_t collect(const float* logits, int64_t count, float floor, uint64_t* ranks) {
  int64_t found = 0, i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    int any = 0;
    for (int64_t j = 0; j < kLanes; ++j) any |= logits[i + j] >= floor;
    if (!any) continue;
    for (int64_t j = i; j < i + kLanes; ++j)
      if (logits[j] >= floor) ranks[found++] = rank_of(logits[j], j);
  }
  for (; i < count; ++i)
    if (logits[i] >= floor) ranks[found++] = rank_of(logits[i], i);
  return found;
}

}  // namespace

int qwenrt_argmax_finite(const float* logits, int64_t count, int64_t* token, float* largest) {
  bool finite = true;
  float most = -INFINITY;
  int64_t block = 0;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t size = std::min(kBlock, count - at);
    float lanes[kLanes];
    largest_by_lane(logits + at, size, lanes);
    const float here = *std::max_element(lanes, lanes + kLanes);
    finite = finite && all_finite(logits + at, size);
    if (here > most) most = here, block = at;
  }
  int64_t place = block;
  while (place < std::min(block + kBlock, count) && logits[place] != most) ++place;
  *token = place < std::min(block + kBlock, count) ? place : 0;
  *largest = most;
  return finite ? QWENRT_OK : QWENRT_NOT_FINITE;
}

int qwenrt_topk(const QwenrtHandle* with, const float* logits, int64_t count, float largest, float temperature,
                int64_t k, float* values, int64_t* ids, float* logsumexp) {
  if (k < 1 || count > UINT32_MAX) return QWENRT_BAD_ARGUMENT;
  if (k > count) return QWENRT_NOT_SERVED;
  uint64_t* ranks = static_cast<uint64_t*>(malloc(size_t(count) * sizeof(uint64_t)));
  float* most = static_cast<float*>(malloc(size_t(lanes_of(count)) * sizeof(float)));
  int status = ranks && most ? QWENRT_OK : QWENRT_NO_MEMORY;
  if (status == QWENRT_OK) {
    const int64_t found = collect(logits, count, reached_by(logits, count, k, most), ranks);
    if (found < k) {
      status = QWENRT_NOT_SERVED;
    } else {
      if (found > k) std::nth_element(ranks, ranks + k - 1, ranks + found);
      std::sort(ranks, ranks + k);
      for (int64_t i = 0; i < k; ++i) {
        ids[i] = int64_t(ranks[i] & 0xffffffffu);
        const float below = logits[ids[i]] - largest;
        values[i] = below / temperature;
      }
    }
  }
  free(ranks);
  free(most);
  if (status == QWENRT_OK && logsumexp)
    *logsumexp = float(log(layer_kernels(*with)->sum_exponentials(logits, count, largest, temperature)));
  return status;
}
