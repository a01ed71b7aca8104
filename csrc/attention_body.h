// Attention of a few queries over one chunk of the paged cache, over layer_vector.h.
//
// A chunk begins at a multiple of kChunk keys, whatever the window and the batch, and within it a row's scores keep
// the place of their key: so a row's sums have the same order wherever it is computed. Keys are walked four at a time
// and all heads of a key in turn: four streams through memory that follow it as it lies.
#pragma once
#include "layer_kernels.h"
#include "layer_vector.h"

namespace {

constexpr int kKeys = 4;

// Query rows of one task: rows [first_row, last_row) of each key head's q_len * group.
struct Rows {
  int64_t q_len, group, first_token, first_position;
  int64_t first_head, last_head, first_row, last_row;
  int64_t count() const { return last_row - first_row; }
  int64_t all() const { return (last_head - first_head) * count(); }
  int64_t query_head(int64_t head, int64_t row) const { return head * group + row % group; }
  int64_t position(int64_t row) const { return first_position + row / group; }
};

INLINE const float* query(const Attention& a, const Rows& rows, int64_t head, int64_t row) {
  const int64_t token = rows.first_token + row / rows.group;
  return a.q + token * a.q_stride + rows.query_head(head, row) * a.cache.head_dim;
}

INLINE int64_t slot_of(const Attention& a, int64_t sequence, int64_t key) {
  const int64_t size = a.cache.block_size;
  return a.sequences.blocks[a.sequences.tables[sequence] + key / size] * size + key % size;
}

// dots[row][key] of ROWS queries and kKeys keys.
template <int ROWS, class Cell>
INLINE void dot_products(const float* const* q, const Cell* const* k, int64_t head_dim, float (*dots)[kKeys]) {
  Vec sums[ROWS][kKeys];
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < kKeys; ++n) sums[r][n] = all(0);
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    Vec x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = load(q[r] + c);
    for (int n = 0; n < kKeys; ++n) {
      const Vec key = load(k[n] + c);
      for (int r = 0; r < ROWS; ++r) sums[r][n] = multiply_add(x[r], key, sums[r][n]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < kKeys; ++n) dots[r][n] = sum(sums[r][n]);
}

// scores[row][key - chunk's first] of keys [begin, end); places beyond the last key hold numbers without meaning.
template <class Cell>
void score(const Attention& a, int64_t sequence, const Rows& rows, int64_t begin, int64_t end, float (*scores)[kChunk]) {
  const QwenrtCache& cache = a.cache;
  const int64_t head_dim = cache.head_dim;
  float query_sums[kRowsAtOnce];
  for (int64_t h = rows.first_head, i = 0; cache.k_scale && h < rows.last_head; ++h)
    for (int64_t r = rows.first_row; r < rows.last_row; ++r, ++i) {
      const float* q = query(a, rows, h, r);
      Vec total = all(0);
      for (int64_t c = 0; c < head_dim; c += kLanes) total = add(total, load(q + c));
      query_sums[i] = sum(total);
    }
  for (int64_t key = begin; key < end; key += kKeys) {
    const int here = int(end - key < kKeys ? end - key : kKeys);
    int64_t cells[kKeys];  // [slot][key head 0]; past the end the last key again
    for (int n = 0; n < kKeys; ++n)
      cells[n] = slot_of(a, sequence, key + (n < here ? n : here - 1)) * cache.num_kv_heads;
    for (int64_t h = rows.first_head, i = 0; h < rows.last_head; ++h) {
      const Cell* k[kKeys];
      for (int n = 0; n < kKeys; ++n) k[n] = static_cast<const Cell*>(cache.k) + (cells[n] + h) * head_dim;
      for (int64_t r = rows.first_row; r < rows.last_row;) {
        const int pair = rows.last_row - r >= 2 ? 2 : 1;
        const float* q[2] = {query(a, rows, h, r), query(a, rows, h, r + pair - 1)};
        float dots[2][kKeys];
        if (pair == 2) dot_products<2>(q, k, head_dim, dots);
        else dot_products<1>(q, k, head_dim, dots);
        for (int p = 0; p < pair; ++p, ++r, ++i)
          for (int n = 0; n < here; ++n) {
            float value = dots[p][n];
            if (cache.k_scale) value = cache.k_scale[cells[n] + h] * value + cache.k_zero[cells[n] + h] * query_sums[i];
            scores[i][(key + n) % kChunk] = value * a.scale;
          }
      }
    }
  }
}

// Scores of places [begin, end) of a chunk -> exp(score - largest), and 0 in the rest of the first and last eight.
void softmax(float* scores, int64_t begin, int64_t end, float* largest, float* total) {
  const int64_t first = begin / kLanes * kLanes, last = (end + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = first; i < begin; ++i) scores[i] = -infinity();
  for (int64_t i = end; i < last; ++i) scores[i] = -infinity();
  Vec most = all(-infinity());
  for (int64_t i = first; i < last; i += kLanes) most = larger(load(scores + i), most);
  const float m = ::largest(most);
  Vec sums = all(0);
  for (int64_t i = first; i < last; i += kLanes) {
    const Vec p = exponential(sub(load(scores + i), all(m)));
    store(scores + i, p);
    sums = add(sums, p);
  }
  *largest = m;
  *total = sum(sums);
}

template <int N, class Cell>
INLINE void add_values(float* out, const float* weights, const Cell* const* v, int64_t head_dim) {
  Vec w[N];
  for (int n = 0; n < N; ++n) w[n] = all(weights[n]);
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    Vec y = load(out + c);
    for (int n = 0; n < N; ++n) y = multiply_add(w[n], load(v[n] + c), y);
    store(out + c, y);
  }
}

// Each row's values weighted by `scores`; bounds[row]: its first and last place in the chunk.
template <class Cell>
void weigh(const Attention& a, int64_t sequence, const Rows& rows, int64_t begin, int64_t end,
           const float (*scores)[kChunk], const int64_t (*bounds)[2], const Partials& partials) {
  const QwenrtCache& cache = a.cache;
  const int64_t head_dim = cache.head_dim, origin = begin / kChunk * kChunk;
  float zeros[kRowsAtOnce] = {};
  for (int64_t key = begin; key < end; key += kKeys) {
    const int here = int(end - key < kKeys ? end - key : kKeys);
    int64_t cells[kKeys] = {};
    for (int n = 0; n < here; ++n) cells[n] = slot_of(a, sequence, key + n) * cache.num_kv_heads;
    for (int64_t h = rows.first_head, i = 0; h < rows.last_head; ++h)
      for (int64_t r = rows.first_row; r < rows.last_row; ++r, ++i) {
        int64_t place = key - origin, last = place + here;
        if (place < bounds[i][0]) place = bounds[i][0];
        if (last > bounds[i][1]) last = bounds[i][1];
        if (place >= last) continue;
        const Cell* v[kKeys];
        float weights[kKeys];
        const int count = int(last - place);
        for (int n = 0; n < count; ++n) {
          const int64_t cell = cells[place + n + origin - key] + h;
          v[n] = static_cast<const Cell*>(cache.v) + cell * head_dim;
          weights[n] = scores[i][place + n];
          if (cache.v_scale) {
            zeros[i] += weights[n] * cache.v_zero[cell];
            weights[n] *= cache.v_scale[cell];
          }
        }
        float* out = partials.values + (r / rows.group * a.num_heads + rows.query_head(h, r)) * head_dim;
        if (count == 4) add_values<4>(out, weights, v, head_dim);
        else if (count == 3) add_values<3>(out, weights, v, head_dim);
        else if (count == 2) add_values<2>(out, weights, v, head_dim);
        else add_values<1>(out, weights, v, head_dim);
      }
  }
  for (int64_t h = rows.first_head, i = 0; cache.v_scale && h < rows.last_head; ++h)
    for (int64_t r = rows.first_row; r < rows.last_row; ++r, ++i) {
      float* out = partials.values + (r / rows.group * a.num_heads + rows.query_head(h, r)) * head_dim;
      for (int64_t c = 0; c < head_dim; c += kLanes) store(out + c, add(load(out + c), all(zeros[i])));
    }
}

template <class Cell>
void attend_rows(const Attention& a, int64_t sequence, int64_t chunk, const Rows& rows, const Partials& partials) {
  const int64_t origin = chunk * kChunk, kv_len = a.sequences.kv_lens[sequence];
  const int64_t end = origin + kChunk < kv_len ? origin + kChunk : kv_len;
  const int64_t seen = a.window ? rows.position(rows.first_row) - a.window + 1 : 0;  // by the first of the rows
  const int64_t begin = seen > origin ? seen : origin;
  alignas(32) float scores[kRowsAtOnce][kChunk];
  int64_t bounds[kRowsAtOnce][2];
  score<Cell>(a, sequence, rows, begin, end, scores);
  for (int64_t h = rows.first_head, i = 0; h < rows.last_head; ++h)
    for (int64_t r = rows.first_row; r < rows.last_row; ++r, ++i) {
      const int64_t past = rows.position(r) + 1, from = a.window ? past - a.window : 0;
      bounds[i][0] = from > origin ? from - origin : 0;
      bounds[i][1] = past < end ? past - origin : end - origin;
      const int64_t row = r / rows.group * a.num_heads + rows.query_head(h, r);
      memset(partials.values + row * a.cache.head_dim, 0, size_t(a.cache.head_dim) * sizeof(float));
      partials.sums[row] = 0;
      partials.largest[row] = -infinity();
      if (bounds[i][0] < bounds[i][1])
        softmax(scores[i], bounds[i][0], bounds[i][1], partials.largest + row, partials.sums + row);
    }
  weigh<Cell>(a, sequence, rows, begin, end, scores, bounds, partials);
}

void attend(const Attention& a, int64_t sequence, int64_t chunk, int64_t first_head, int64_t last_head,
            const Partials& partials) {
  const int64_t q_len = a.sequences.q_lens[sequence], group = a.num_heads / a.cache.num_kv_heads;
  const int64_t per_head = q_len * group, first_position = a.sequences.kv_lens[sequence] - q_len;
  const int64_t heads = per_head < kRowsAtOnce ? kRowsAtOnce / per_head : 1;
  for (int64_t h = first_head; h < last_head; h += heads)
    for (int64_t r = 0; r < per_head; r += kRowsAtOnce) {
      const Rows rows{q_len, group, a.sequences.first_tokens[sequence], first_position,
                      h,     h + heads < last_head ? h + heads : last_head,
                      r,     r + kRowsAtOnce < per_head ? r + kRowsAtOnce : per_head};
      if (a.cache.k_scale) attend_rows<uint8_t>(a, sequence, chunk, rows, partials);
      else attend_rows<float>(a, sequence, chunk, rows, partials);
    }
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
    float lanes[kLanes];
    store(lanes, exponential(all(partials.largest[at] - largest)));
    total += lanes[0] * partials.sums[at];
    const float* values = partials.values + at * head_dim;
    add_values<1>(out, lanes, &values, head_dim);
  }
  for (int64_t i = 0; i < head_dim; i += kLanes) store(out + i, div(load(out + i), all(total)));
}

}  // namespace
