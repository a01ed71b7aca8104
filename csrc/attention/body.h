// Attention over the paged cache: a short query walks its context in chunks that are combined, a longer one in tiles.
#pragma once
#include "attention/chunk.h"
#include "attention/tile.h"

namespace {

void attend(const Attention& a, const AttentionPiece& piece, const Partials& partials, float* memory) {
  if (a.sequences.q_lens[piece.sequence] <= kShortQuery) attend_chunk(a, piece, partials, memory);
  else if (a.cache.k_scale) attend_tile<uint8_t>(a, piece, memory);
  else attend_tile<float>(a, piece, memory);
}

void combine(const Partials& partials, int64_t row, int64_t chunks, int64_t stride, int64_t head_dim, float* out) {
  float largest = -infinity(), total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const float here = partials.largest[row + c * stride];
    if (here > largest) largest = here;
  }
  memset(out, 0, size_t(head_dim) * sizeof(float));
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t at = row + c * stride;
    if (partials.sums[at] == 0) continue;  // no key of this chunk is seen
    const Vec weight = exponential(all(partials.largest[at] - largest));
    float lanes[kLanes];
    store(lanes, weight);
    total += lanes[0] * partials.sums[at];
    const float* values = partials.values + at * head_dim;
    for (int64_t i = 0; i < head_dim; i += kLanes)
      store(out + i, multiply_add(weight, load(values + i), load(out + i)));
  }
  for (int64_t i = 0; i < head_dim; i += kLanes) store(out + i, div(load(out + i), all(total)));
}

}  // namespace
