// Where the keys of a sequence lie in the paged cache, and asking for them before they are needed.
#pragma once
#include "isa/layer_kernels.h"
#include "isa/vector.h"

namespace {

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

// cells[key - origin]: the cell [slot][key head 0] of keys [begin, end); origin <= begin < end. Around them, up to
// multiples of `step` from origin, the nearest of these keys again: what is beyond them may hold anything.
INLINE void find_cells(const Attention& a, int64_t sequence, int64_t origin, int64_t begin, int64_t end, int64_t step,
                       int64_t* cells) {
  const int64_t size = a.cache.block_size, heads = a.cache.num_kv_heads;
  const int64_t* blocks = a.sequences.blocks + a.sequences.tables[sequence];
  for (int64_t key = begin; key < end;) {
    const int64_t block = key / size, stop = least_of(end, (block + 1) * size);
    int64_t cell = (blocks[block] * size + key - block * size) * heads;
    for (; key < stop; ++key, cell += heads) cells[key - origin] = cell;
  }
  const int64_t first = begin - origin, last = end - origin;
  for (int64_t i = first / step * step; i < first; ++i) cells[i] = cells[first];
  for (int64_t i = last; i % step; ++i) cells[i] = cells[last - 1];
}

// Asks for memory that will be read soon. Into the second-level cache: in the first it would not last until then.
INLINE void prefetch(const void* memory, int64_t bytes) {
#if defined(__GNUC__)
  const char* p = static_cast<const char*>(memory);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace
