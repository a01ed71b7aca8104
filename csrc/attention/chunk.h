// Attention of a few queries over one chunk of the paged cache, over isa/vector.h: bound by reading the cache.
//
// A chunk begins at a multiple of kChunk keys, whatever the window and the batch, and within it a row's scores keep
// the place of their key; a row's sums are made in one order whichever rows are computed beside it. So a row is the
// same wherever it is computed. Keys are walked a step at a time and all heads of a step in turn: memory is read as it
// lies, and asked for before it is needed.
#pragma once
#include "attention/cells.h"
#include "attention/codes.h"
#include "isa/unroll.h"

namespace {

constexpr int64_t kStep = 16;             // keys
constexpr int64_t kAheadBytes = 8 * 1024;  // asked for before they are needed
constexpr int kSums = 8;                  // vectors of sums in registers

// Query rows of one pass: rows [first_row, last_row) of each key head's q_len * group, and places [first, last) of the
// chunk, multiples of kStep; from `end` on there are no keys.
struct Rows {
  int64_t q_len, group, first_token, first_position;
  int64_t first_head, last_head, first_row, last_row;
  int64_t first, last, end;
  int64_t count() const { return last_row - first_row; }
  int64_t all() const { return (last_head - first_head) * count(); }
};

struct ChunkMemory {
  static void* operator new(size_t, void* at) { return at; }  // <new> is the standard library's: see CONTRIBUTING.md
  float scores[kRowsAtOnce][kChunk];
  float scales[kLanes][kChunk], zeros[kLanes][kChunk];  // of the codes of some heads
  int64_t cells[kChunk];
  const float* queries[kRowsAtOnce];
  float* outs[kRowsAtOnce];
  int32_t* coded_outs[kRowsAtOnce];              // weighted codes, in the place of outs until all are there
  float sums[kRowsAtOnce], shifts[kRowsAtOnce];  // of the weights, and of the weights times v_zero
  float query_sums[kRowsAtOnce], query_steps[kRowsAtOnce], weight_steps[kRowsAtOnce];  // steps: of what is rounded
  int16_t rounded[kRowsAtOnce][kMostChannels];  // queries
  int16_t weights[kRowsAtOnce][kChunk];
};
static_assert(sizeof(ChunkMemory) <= size_t(attention_memory(8)) * sizeof(float), "attention_memory is too small");

// Whether products with codes are made in integers: of whole vectors alone.
INLINE bool rounds(const Attention& a) { return a.cache.rounded && a.cache.k_scale && a.cache.head_dim % kCodes == 0; }

// Asks for the step that is kAheadBytes after the one that is read.
template <class Cell>
struct Ahead {
  const Cell* memory;
  const int64_t* cells;
  int64_t head_dim, first_head, last_head, last, place, head;
  Ahead(const Cell* memory, const int64_t* cells, int64_t head_dim, const Rows& rows)
      : memory(memory), cells(cells), head_dim(head_dim), first_head(rows.first_head), last_head(rows.last_head),
        last(rows.last), place(rows.first), head(rows.first_head) {
    const int64_t steps = (kAheadBytes - 1) / (kStep * head_dim * int64_t(sizeof(Cell))) + 1;
    for (int64_t i = 0; i < steps && place < last; ++i) ask();
  }
  INLINE void ask() {
    if (place >= last) return;
    for (int64_t n = 0; n < kStep; ++n)
      prefetch(memory + (cells[place + n] + head) * head_dim, head_dim * int64_t(sizeof(Cell)));
    if (++head < last_head) return;
    head = first_head;
    place += kStep;
  }
};

// Scores of ROWS queries and the keys of places [place, end) of one head, and of up to kSums - 1 beyond.
template <int ROWS, class Cell>
INLINE void dot_products(const float* const* q, const Cell* k, const int64_t* cells, int64_t head_dim,
                         float (*scores)[kChunk], int64_t place, int64_t end) {
  constexpr int KEYS = kSums / ROWS;
  for (int64_t first = place; first < end; first += KEYS) {
    const Cell* key[KEYS];
    for (int n = 0; n < KEYS; ++n) key[n] = k + cells[first + n] * head_dim;
    Vec sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = all(0);
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      Vec x[ROWS];
      for (int r = 0; r < ROWS; ++r) x[r] = load(q[r] + c);
      for (int n = 0; n < KEYS; ++n) {
        const Vec y = load(key[n] + c);
        for (int r = 0; r < ROWS; ++r) sums[r * KEYS + n] = multiply_add(x[r], y, sums[r * KEYS + n]);
      }
    }
    float dots[kSums];
    store(dots, sum_each(sums));
    for (int r = 0; r < ROWS; ++r) memcpy(scores[r] + first, dots + r * KEYS, sizeof(float) * KEYS);
  }
}

// f(count, i, h, place, stop) for the rows of each head, a step of places [place, stop) after the other: `count` of
// them from the i-th on, of key head h, as many together as share what they read. Asks for what comes next.
template <class Cell, class Each>
INLINE void each_step(const Rows& rows, Ahead<Cell> ahead, const Each& f) {
  for (int64_t place = rows.first; place < rows.last; place += kStep) {
    const int64_t stop = least_of(place + kStep, rows.end);
    for (int64_t h = rows.first_head, i = 0; h < rows.last_head; ++h) {
      ahead.ask();
      const int64_t end = i + rows.count();
      for (; end - i >= 4; i += 4) f(Index<4>(), i, h, place, stop);
      for (; end - i >= 2; i += 2) f(Index<2>(), i, h, place, stop);
      for (; i < end; ++i) f(Index<1>(), i, h, place, stop);
    }
  }
}

// scores[row][place] = q k, of all rows.
template <class Cell, bool ROUNDED>
void score(const Attention& a, const Rows& rows, ChunkMemory& m) {
  const int64_t head_dim = a.cache.head_dim;
  const Cell* k = static_cast<const Cell*>(a.cache.k);
  each_step(rows, Ahead<Cell>(k, m.cells, head_dim, rows),
            [&](auto count, int64_t i, int64_t h, int64_t place, int64_t stop) __attribute__((always_inline)) {
    if constexpr (ROUNDED)
      dot_codes<count>(m.rounded + i, k + h * head_dim, m.cells, head_dim, m.scores + i, place, stop);
    else
      dot_products<count>(m.queries + i, k + h * head_dim, m.cells, head_dim, m.scores + i, place, stop);
  });
}

// q k of places [first, last) -> weights exp(score - largest) of places [begin, end) of these, and 0 in the others.
INLINE void soften(float* scores, int64_t first, int64_t last, int64_t begin, int64_t end, float* largest,
                   float* total) {
  for (int64_t i = first; i < begin; ++i) scores[i] = -infinity();
  for (int64_t i = end; i < last; ++i) scores[i] = -infinity();
  Vec most = all(-infinity()), sums = all(0);
  for (int64_t i = first; i < last; i += kLanes) most = larger(load(scores + i), most);
  *largest = ::largest(most);
  for (int64_t i = first; i < last; i += kLanes) {
    const Vec p = exponential(sub(load(scores + i), all(*largest)));
    store(scores + i, p);
    sums = add(sums, p);
  }
  *total = sum(sums);
}

// by_place[head % kLanes][place] = numbers[cell][head], of `head` or of kLanes heads from it on.
INLINE void turn(const float* numbers, int64_t head, int64_t heads, const Rows& rows, const int64_t* cells,
                 float (*by_place)[kChunk]) {
  for (int64_t p = rows.first; p < rows.last; p += kLanes) {
    if (heads < kLanes) {
      for (int64_t i = p; i < p + kLanes; ++i) by_place[0][i] = numbers[cells[i] + head];
      continue;
    }
    Vec x[kLanes];
    for (int n = 0; n < kLanes; ++n) x[n] = load(numbers + cells[p + n] + head);
    transpose(x);
    for (int n = 0; n < kLanes; ++n) store(by_place[n] + p, x[n]);
  }
}

// Makes the codes' scales and zeros of a head be in the memory -> where there. Called for one head after another.
INLINE int64_t find_scales(const float* scale, const float* zero, int64_t head, const Rows& rows, ChunkMemory& m) {
  const int64_t behind = head - rows.first_head, together = behind / kLanes * kLanes + rows.first_head;
  const bool whole = together + kLanes <= rows.last_head;
  if (whole && head != together) return head - together;
  turn(scale, head, whole ? kLanes : 1, rows, m.cells, m.scales);
  turn(zero, head, whole ? kLanes : 1, rows, m.cells, m.zeros);
  return 0;
}

// Scores of one head's rows [i, i + rows.count()) -> q (scale * code + zero) * scale of attention.
INLINE void scale_scores(const Attention& a, int64_t head, const Rows& rows, int64_t i, ChunkMemory& m) {
  const QwenrtCache& cache = a.cache;
  const int64_t at = cache.k_scale ? find_scales(cache.k_scale, cache.k_zero, head, rows, m) : 0;
  for (const int64_t end = i + rows.count(); i < end; ++i) {
    float* scores = m.scores[i];
    const Vec factor = all(a.scale), shift = all(m.query_sums[i]), step = all(m.query_steps[i]);
    for (int64_t p = rows.first; p < rows.last; p += kLanes) {
      Vec x = load(scores + p);
      if (cache.k_scale) x = multiply_add(mul(load(m.scales[at] + p), step), x, mul(load(m.zeros[at] + p), shift));
      store(scores + p, mul(x, factor));
    }
  }
}

// Weights of one head's rows -> weights of the codes, and what the zeros add. Rounded ones are those of codes around the
// middle one, so that what rounding adds is small as values are and not as codes: the sums begin below zero.
template <bool ROUNDED>
INLINE void scale_weights(const Attention& a, int64_t head, const Rows& rows, int64_t i, ChunkMemory& m) {
  const int64_t at = find_scales(a.cache.v_scale, a.cache.v_zero, head, rows, m);
  for (const int64_t end = i + rows.count(); i < end; ++i) {
    Vec shifts = all(0);
    for (int64_t p = rows.first; p < rows.last; p += kLanes) {
      const Vec weight = load(m.scores[i] + p), scaled = mul(weight, load(m.scales[at] + p));
      shifts = multiply_add(weight, load(m.zeros[at] + p), shifts);
      if constexpr (ROUNDED) shifts = multiply_add(scaled, all(kMiddleCode), shifts);
      store(m.scores[i] + p, scaled);
    }
    m.shifts[i] = sum(shifts);
    if constexpr (ROUNDED) {
      const int64_t count = rows.last - rows.first;
      const Rounded of = round_to_16_bits(m.scores[i] + rows.first, count, m.weights[i] + rows.first);
      m.weight_steps[i] = of.step;
      m.shifts[i] += of.sum - of.sum;  // NaN where that is
      const int32_t begin = of.sum == of.sum ? -kMiddleCode * int32_t(of.sum) : 0;
      for (int64_t c = 0; c < a.cache.head_dim; ++c) m.coded_outs[i][c] = begin;
    }
  }
}

// outs[row][c ...] += weight * value of places [place, end), for VECS vectors of channels.
template <int ROWS, int VECS, class Cell>
INLINE void add_channels(float (*weights)[kChunk], const Cell* v, const int64_t* cells, int64_t head_dim, int64_t place,
                         int64_t end, float* const* outs, int64_t c) {
  Vec y[ROWS][VECS];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < VECS; ++i) y[r][i] = load(outs[r] + c + i * kLanes);
  for (int64_t n = place; n < end; ++n) {
    const Cell* value = v + cells[n] * head_dim + c;
    Vec w[ROWS];
    for (int r = 0; r < ROWS; ++r) w[r] = all(weights[r][n]);
    for (int i = 0; i < VECS; ++i) {
      const Vec x = load(value + i * kLanes);
      for (int r = 0; r < ROWS; ++r) y[r][i] = multiply_add(w[r], x, y[r][i]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < VECS; ++i) store(outs[r] + c + i * kLanes, y[r][i]);
}

template <int ROWS, class Cell>
INLINE void add_values(float (*weights)[kChunk], const Cell* v, const int64_t* cells, int64_t head_dim, int64_t place,
                       int64_t end, float* const* outs) {
  constexpr int VECS = kSums / ROWS;
  int64_t c = 0;
  for (; c + VECS * kLanes <= head_dim; c += VECS * kLanes)
    add_channels<ROWS, VECS>(weights, v, cells, head_dim, place, end, outs, c);
  for (; c < head_dim; c += kLanes) add_channels<ROWS, 1>(weights, v, cells, head_dim, place, end, outs, c);
}

template <class Cell, bool ROUNDED>
void weigh(const Attention& a, const Rows& rows, ChunkMemory& m) {
  const int64_t head_dim = a.cache.head_dim;
  const Cell* v = static_cast<const Cell*>(a.cache.v);
  each_step(rows, Ahead<Cell>(v, m.cells, head_dim, rows),
            [&](auto count, int64_t i, int64_t h, int64_t place, int64_t stop) __attribute__((always_inline)) {
    if constexpr (ROUNDED)
      add_coded_values<count>(m.weights + i, v + h * head_dim, m.cells, head_dim, place, stop, m.coded_outs + i);
    else
      add_values<count>(m.scores + i, v + h * head_dim, m.cells, head_dim, place, stop, m.outs + i);
  });
}

// What scores need of one row's query beside itself.
template <bool ROUNDED>
INLINE void prepare_query(int64_t head_dim, int64_t i, ChunkMemory& m) {
  if constexpr (ROUNDED) {
    const Rounded of = round_to_16_bits(m.queries[i], head_dim, m.rounded[i]);
    m.query_steps[i] = of.step;
    m.query_sums[i] = of.sum * of.step;
  } else {
    Vec total = all(0);
    for (int64_t c = 0; c < head_dim; c += kLanes) total = add(total, load(m.queries[i] + c));
    m.query_steps[i] = 1;
    m.query_sums[i] = sum(total);
  }
}

// One pass over the chunk's keys [begin, end) that any of its rows may see.
template <class Cell, bool ROUNDED>
void attend_rows(const Attention& a, const AttentionPiece& piece, const Rows& rows, int64_t begin, int64_t end,
                 const Partials& partials, ChunkMemory& m) {
  const int64_t head_dim = a.cache.head_dim, origin = piece.chunk * kChunk;
  find_cells(a, piece.sequence, origin, begin, end, kStep, m.cells);
  for (int64_t h = rows.first_head, i = 0; h < rows.last_head; ++h)
    for (int64_t r = rows.first_row; r < rows.last_row; ++r, ++i) {
      const int64_t token = r / rows.group, head = h * rows.group + r % rows.group;
      m.queries[i] = a.q + (rows.first_token + token) * a.q_stride + head * head_dim;
      const int64_t row = token * a.num_heads + head;
      m.outs[i] = piece.partials < 0 ? a.out + (rows.first_token * a.num_heads + row) * head_dim
                                     : partials.values + (piece.partials + row) * head_dim;
      memset(m.outs[i], 0, size_t(head_dim) * sizeof(float));
      m.coded_outs[i] = reinterpret_cast<int32_t*>(m.outs[i]);
      if (a.cache.k_scale) prepare_query<ROUNDED>(head_dim, i, m);
    }
  score<Cell, ROUNDED>(a, rows, m);
  for (int64_t h = rows.first_head, i = 0; h < rows.last_head; ++h) {
    scale_scores(a, h, rows, i, m);
    for (int64_t r = rows.first_row; r < rows.last_row; ++r, ++i) {
      const int64_t past = rows.first_position + r / rows.group + 1, from = a.window ? past - a.window : 0;
      const int64_t low = most_of(from, begin) - origin, high = least_of(past, end) - origin;
      float largest = -infinity();
      m.sums[i] = m.shifts[i] = 0;
      if (low < high) soften(m.scores[i], rows.first, rows.last, low, high, &largest, m.sums + i);
      else memset(m.scores[i], 0, sizeof m.scores[i]);
      if (piece.partials < 0) continue;
      const int64_t row = piece.partials + r / rows.group * a.num_heads + h * rows.group + r % rows.group;
      partials.largest[row] = largest;
      partials.sums[row] = m.sums[i];
    }
  }
  for (int64_t h = rows.first_head; a.cache.v_scale && h < rows.last_head; ++h)
    scale_weights<ROUNDED>(a, h, rows, (h - rows.first_head) * rows.count(), m);
  weigh<Cell, ROUNDED>(a, rows, m);
  for (int64_t i = 0; i < rows.all(); ++i)
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      const Vec x = ROUNDED ? mul(load(m.coded_outs[i] + c), all(m.weight_steps[i])) : load(m.outs[i] + c);
      const Vec y = add(x, all(m.shifts[i]));
      store(m.outs[i] + c, piece.partials < 0 ? div(y, all(m.sums[i])) : y);
    }
}

void attend_chunk(const Attention& a, const AttentionPiece& piece, const Partials& partials, float* memory) {
  const int64_t s = piece.sequence, q_len = a.sequences.q_lens[s], kv_len = a.sequences.kv_lens[s];
  const int64_t group = a.num_heads / a.cache.num_kv_heads, per_head = q_len * group;
  const int64_t heads = per_head < kRowsAtOnce ? kRowsAtOnce / per_head : 1, origin = piece.chunk * kChunk;
  for (int64_t h = piece.first_head; h < piece.last_head; h += heads)
    for (int64_t r = 0; r < per_head; r += kRowsAtOnce) {
      Rows rows{q_len, group, a.sequences.first_tokens[s], kv_len - q_len,
                h,     least_of(h + heads, piece.last_head),
                r,     least_of(r + kRowsAtOnce, per_head),
                0,     0,
                0};
      const int64_t seen = a.window ? rows.first_position + r / group + 1 - a.window : 0;  // by the first row
      const int64_t end = least_of(origin + kChunk, kv_len), begin = least_of(most_of(seen, origin), end - 1);
      rows.first = (begin - origin) / kStep * kStep;
      rows.end = end - origin;
      rows.last = (rows.end + kStep - 1) / kStep * kStep;
      ChunkMemory& m = *new (memory) ChunkMemory;
      if (rounds(a)) attend_rows<uint8_t, true>(a, piece, rows, begin, end, partials, m);
      else if (a.cache.k_scale) attend_rows<uint8_t, false>(a, piece, rows, begin, end, partials, m);
      else attend_rows<float, false>(a, piece, rows, begin, end, partials, m);
    }
}

}  // namespace
