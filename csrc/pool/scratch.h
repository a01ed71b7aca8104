// Memory that grows and is kept between calls, used under PoolLock.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <new>

// One array of a Scratch: where its address goes, and how many elements it has; without any, the address is NULL.
template <class T>
struct Array {
  T*& at;
  int64_t count;
};

template <class T>
Array<T> array(T*& at, int64_t count) {
  return {at, count};
}

// One for each user: what it holds lasts until the same user asks again. Never freed at exit, as the pool is not.
class Scratch {
 public:
  // Room for these arrays, each from the begin of a cache line on, of elements that hold anything. False where there is
  // no memory.
  template <class... T>
  bool room(Array<T>... arrays) {
    if (!grow((bytes_of(arrays) + ... + 0))) return false;
    char* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + kLine - 1) / kLine * kLine);
    ((begin(arrays, next), next += bytes_of(arrays)), ...);
    return true;
  }

 private:
  static constexpr uintptr_t kLine = 64;
  void* memory_ = nullptr;
  int64_t size_ = 0;

  template <class T>
  static int64_t bytes_of(const Array<T>& array) {
    static_assert(alignof(T) <= kLine, "arrays begin with a cache line");
    return (array.count * int64_t(sizeof(T)) + int64_t(kLine) - 1) / int64_t(kLine) * int64_t(kLine);
  }

  // Here the elements' lifetimes begin; of numbers and of structs of them no instruction is left.
  template <class T>
  static void begin(Array<T>& array, char* memory) {
    array.at = array.count ? ::new (static_cast<void*>(memory)) T : nullptr;
    for (int64_t i = 1; i < array.count; ++i) ::new (static_cast<void*>(memory + i * int64_t(sizeof(T)))) T;
  }

  bool grow(int64_t bytes) {
    if (bytes <= size_) return true;
    free(memory_);
    memory_ = malloc(size_t(bytes) + kLine);
    size_ = memory_ ? bytes : 0;
    return memory_ != nullptr;
  }
};
