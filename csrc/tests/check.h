// What the C++ tests share: a check that says where and with which numbers, and reproducible random numbers.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <utility>
#include <vector>

#include "abi/qwenrt_cpu.h"

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fprintf(stderr, "\n");                                          \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

// What calls are computed with.
inline const QwenrtHandle* with = nullptr;
inline void use(const char* set) {
  with = qwenrt_open(set, 2);
  CHECK(with, "%s", set);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {  // PCG
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const uint32_t word = uint32_t(((state_ >> 18) ^ state_) >> 27), turn = uint32_t(state_ >> 59);
    return word >> turn | word << (-turn & 31);
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  bool coin() { return bits() & 1; }
  float uniform() { return float(bits() >> 8) / float(1 << 24) * 2 - 1; }  // -1 to 1
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }
  std::vector<float> floats(int64_t count, float size = 1) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = uniform() * size;
    return values;
  }

 private:
  uint64_t state_;
};

// As most linears of a model have it.
inline QwenrtActivations rounded(int kind) { return {kind, 4, 5, 0, INT64_MAX}; }
