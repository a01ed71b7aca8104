// Memory that grows and is kept between calls, used under PoolLock.
#pragma once
#include <stdint.h>
#include <stdlib.h>

// One for each user: what it holds lasts until the same user asks again. Never freed at exit, as the pool is not.
class Scratch {
 public:
  // At least `bytes`, from the begin of a cache line on, holding anything; NULL where there is no memory.
  char* room(int64_t bytes) {
    if (bytes > size_) {
      free(memory_);
      memory_ = malloc(size_t(bytes) + kLine);
      size_ = memory_ ? bytes : 0;
    }
    return memory_ ? reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + kLine - 1) / kLine * kLine) : nullptr;
  }

 private:
  static constexpr uintptr_t kLine = 64;
  void* memory_ = nullptr;
  int64_t size_ = 0;
};
