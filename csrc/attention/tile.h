// Attention of many queries, over isa/vector.h: bound by arithmetic. Query rows of one key head against tiles of
// kTileKeys keys, whose keys and values are first laid out as float panels for two small matrix products; the softmax
// is corrected from tile to tile.
//
// Tiles of keys begin at multiples of kTileKeys, and every sum of a row is made in the order of the channels or keys:
// so a row is the same whichever rows are computed beside it. Keys that a row does not see have weight 0.
#pragma once
#include "attention/cells.h"

namespace {

constexpr int64_t kPanel = 2 * kLanes;  // columns of a panel; a last panel of values may be half as wide

struct TileMemory {
  float* queries;  // [rows][head_dim], times the scale
  float* outs;     // [rows][head_dim], not yet divided by the sums of weights
  float* keys;     // [panel][head_dim][key of panel]
  float* values;   // [panel][key][channel of panel]
  float* scores;   // [rows][kTileKeys]
  float* largest;  // [rows]
  float* sums;
  float* corrections;  // of the values before this tile
};

// The rows of a piece, and what they see.
struct TileRows {
  int64_t first, last, group, first_position, window;
  int64_t count() const { return last - first; }
  int64_t padded() const { return (count() + kBlockRows - 1) / kBlockRows * kBlockRows; }
  int64_t end(int64_t row) const { return first_position + (first + row) / group + 1; }  // of the keys row `row` sees
  int64_t begin(int64_t row) const { return window ? most_of(end(row) - window, 0) : 0; }
  int64_t last_of(int64_t block) const { return least_of(block + kBlockRows, count()) - 1; }
};

struct Places {  // of a tile
  int64_t begin, end;
};

INLINE Places places(int64_t begin, int64_t end, int64_t origin) {
  return {most_of(begin - origin, 0), least_of(end - origin, kTileKeys)};
}

INLINE TileMemory divide_memory(float* memory, int64_t head_dim) {
  TileMemory m;
  m.queries = memory;
  m.outs = m.queries + kTileRows * head_dim;
  m.keys = m.outs + kTileRows * head_dim;
  m.values = m.keys + kTileKeys * head_dim;
  m.scores = m.values + kTileKeys * head_dim;
  m.largest = m.scores + kTileRows * kTileKeys;
  m.sums = m.largest + kTileRows;
  m.corrections = m.sums + kTileRows;
  return m;
}

// One side of the cache and one key head of it.
template <class Cell>
struct Side {
  const Cell* memory;
  const float *scale, *zero;
  int64_t head_dim;
  INLINE const Cell* row(int64_t cell) const { return memory + cell * head_dim; }
  INLINE Vec at(int64_t cell, int64_t c, Vec factor, Vec shift) const {
    const Vec x = load(row(cell) + c);
    return scale ? multiply_add(x, factor, shift) : x;
  }
  INLINE void scales(int64_t cell, Vec* factor, Vec* shift) const {
    *factor = all(scale ? scale[cell] : 1.0f);
    *shift = all(scale ? zero[cell] : 0.0f);
  }
};

// Keys of places [begin, end), whole panels, each turned so that a channel's keys lie together.
template <class Cell>
void pack_keys(const Side<Cell>& k, const int64_t* cells, Places places, float* keys) {
  for (int64_t p = places.begin; p < places.end; p += kLanes) {
    float* panel = keys + p / kPanel * kPanel * k.head_dim + p % kPanel;
    Vec factors[kLanes], shifts[kLanes];
    for (int n = 0; n < kLanes; ++n) k.scales(cells[p + n], factors + n, shifts + n);
    for (int64_t c = 0; c < k.head_dim; c += kLanes) {
      Vec x[kLanes];
      for (int n = 0; n < kLanes; ++n) x[n] = k.at(cells[p + n], c, factors[n], shifts[n]);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(panel + (c + i) * kPanel, x[i]);
    }
  }
}

template <class Cell>
void pack_values(const Side<Cell>& v, const int64_t* cells, Places places, float* values) {
  for (int64_t p = places.begin; p < places.end; ++p) {
    Vec factor, shift;
    v.scales(cells[p], &factor, &shift);
    for (int64_t c = 0; c < v.head_dim; c += kPanel) {
      const int64_t width = least_of(kPanel, v.head_dim - c);
      float* out = values + c * kTileKeys + p * width;
      for (int64_t i = 0; i < width; i += kLanes) store(out + i, v.at(cells[p], c + i, factor, shift));
    }
  }
}

// sums[row][column] = sum over depth of a[row][depth] b[depth][column]: kBlockRows rows, VECS vectors of columns.
template <int VECS>
INLINE void multiply(const float* a, int64_t stride, const float* b, int64_t depth, Vec (*sums)[VECS]) {
  for (int r = 0; r < kBlockRows; ++r)
    for (int i = 0; i < VECS; ++i) sums[r][i] = all(0);
  for (int64_t d = 0; d < depth; ++d, ++a, b += VECS * kLanes) {
    Vec y[VECS];
    for (int i = 0; i < VECS; ++i) y[i] = load(b + i * kLanes);
    for (int r = 0; r < kBlockRows; ++r) {
      const Vec x = all(a[r * stride]);
      for (int i = 0; i < VECS; ++i) sums[r][i] = multiply_add(x, y[i], sums[r][i]);
    }
  }
}

// Asks for the next tile's rows, a share at a time while this one is computed.
template <class Cell>
struct NextTile {
  const Side<Cell>& k;
  const Side<Cell>& v;
  const int64_t* cells;
  int64_t place, count, share;
  INLINE void ask() {
    const int64_t bytes = k.head_dim * int64_t(sizeof(Cell));
    for (const int64_t end = least_of(place + share, count); place < end; ++place) {
      prefetch(k.row(cells[place]), bytes);
      prefetch(v.row(cells[place]), bytes);
    }
  }
};

// Scores of the tile, of each block of rows in the panels that one of them sees.
template <class Cell>
void score_tile(const TileRows& rows, int64_t origin, Places seen, int64_t head_dim, const TileMemory& m,
                NextTile<Cell>& next) {
  for (int64_t panel = seen.begin; panel < seen.end; panel += kPanel)
    for (int64_t block = 0; block < rows.count(); block += kBlockRows) {
      next.ask();
      if (rows.begin(block) >= origin + panel + kPanel || rows.end(rows.last_of(block)) <= origin + panel) continue;
      Vec sums[kBlockRows][2];
      multiply<2>(m.queries + block * head_dim, head_dim, m.keys + panel * head_dim, head_dim, sums);
      for (int r = 0; r < kBlockRows; ++r)
        for (int i = 0; i < 2; ++i) store(m.scores + (block + r) * kTileKeys + panel + i * kLanes, sums[r][i]);
    }
}

// One row's scores -> weights, 0 outside of what it sees and inside of what its block does; then its sums.
INLINE void soften_row(const TileMemory& m, int64_t row, Places seen, Places block) {
  float* scores = m.scores + row * kTileKeys;
  m.corrections[row] = 1;
  if (seen.begin >= seen.end) {
    for (int64_t i = block.begin; i < block.end; ++i) scores[i] = 0;
    return;
  }
  const int64_t first = seen.begin / kLanes * kLanes, last = (seen.end + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = block.begin; i < first; ++i) scores[i] = 0;
  for (int64_t i = first; i < seen.begin; ++i) scores[i] = -infinity();
  for (int64_t i = seen.end; i < last; ++i) scores[i] = -infinity();
  for (int64_t i = last; i < block.end; ++i) scores[i] = 0;
  Vec most = all(-infinity()), sums = all(0);
  for (int64_t i = first; i < last; i += kLanes) most = larger(load(scores + i), most);
  const float before = m.largest[row], here = ::largest(most), now = here > before ? here : before;
  for (int64_t i = first; i < last; i += kLanes) {
    const Vec p = exponential(sub(load(scores + i), all(now)));
    store(scores + i, p);
    sums = add(sums, p);
  }
  if (now != before) {
    float lanes[kLanes];
    store(lanes, exponential(all(before - now)));
    m.corrections[row] = lanes[0];
  }
  m.largest[row] = now;
  m.sums[row] = m.sums[row] * m.corrections[row] + sum(sums);
}

INLINE Places block_places(const TileRows& rows, int64_t block, int64_t origin) {
  return places(rows.begin(block), rows.end(rows.last_of(block)), origin);
}

void soften_tile(const TileRows& rows, int64_t origin, const TileMemory& m) {
  for (int64_t block = 0; block < rows.count(); block += kBlockRows) {
    const Places all_seen = block_places(rows, block, origin);
    for (int64_t r = block; r < block + kBlockRows; ++r) {
      const bool real = r < rows.count();
      soften_row(m, r, real ? places(rows.begin(r), rows.end(r), origin) : Places{0, 0}, all_seen);
    }
  }
}

// outs of one block, VECS vectors of channels from `out` on: corrected, plus the tile's weighted values.
template <int VECS>
INLINE void weigh_block(const float* weights, const float* values, int64_t keys, const float* corrections, float* out,
                        int64_t head_dim) {
  Vec sums[kBlockRows][VECS];
  multiply<VECS>(weights, kTileKeys, values, keys, sums);
  for (int r = 0; r < kBlockRows; ++r)
    for (int i = 0; i < VECS; ++i) {
      float* at = out + r * head_dim + i * kLanes;
      store(at, multiply_add(load(at), all(corrections[r]), sums[r][i]));
    }
}

void weigh_tile(const TileRows& rows, int64_t origin, int64_t head_dim, const TileMemory& m) {
  for (int64_t c = 0; c < head_dim; c += kPanel)
    for (int64_t block = 0; block < rows.count(); block += kBlockRows) {
      const Places seen = block_places(rows, block, origin);
      if (seen.begin >= seen.end) continue;
      const int64_t width = least_of(kPanel, head_dim - c), keys = seen.end - seen.begin;
      const float* weights = m.scores + block * kTileKeys + seen.begin;
      const float* values = m.values + c * kTileKeys + seen.begin * width;
      float* out = m.outs + block * head_dim + c;
      if (width == kPanel) weigh_block<2>(weights, values, keys, m.corrections + block, out, head_dim);
      else weigh_block<1>(weights, values, keys, m.corrections + block, out, head_dim);
    }
}

// Queries times the scale, and 0 where rows are padded to whole blocks.
INLINE void begin_rows(const Attention& a, int64_t sequence, int64_t head, const TileRows& rows, const TileMemory& m) {
  const int64_t head_dim = a.cache.head_dim;
  for (int64_t r = 0; r < rows.padded(); ++r) {
    const int64_t token = a.sequences.first_tokens[sequence] + (rows.first + r) / rows.group;
    const float* q = a.q + token * a.q_stride + (head * rows.group + (rows.first + r) % rows.group) * head_dim;
    float *query = m.queries + r * head_dim, *out = m.outs + r * head_dim;
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      store(query + c, r < rows.count() ? mul(load(q + c), all(a.scale)) : all(0));
      store(out + c, all(0));
    }
    m.largest[r] = -infinity();
    m.sums[r] = 0;
  }
}

INLINE void end_rows(const Attention& a, int64_t sequence, int64_t head, const TileRows& rows, const TileMemory& m) {
  const int64_t head_dim = a.cache.head_dim;
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t token = a.sequences.first_tokens[sequence] + (rows.first + r) / rows.group;
    float* out = a.out + (token * a.num_heads + head * rows.group + (rows.first + r) % rows.group) * head_dim;
    for (int64_t c = 0; c < head_dim; c += kLanes)
      store(out + c, div(load(m.outs + r * head_dim + c), all(m.sums[r])));
  }
}

template <class Cell>
void attend_tile(const Attention& a, const AttentionPiece& piece, float* memory) {
  const int64_t s = piece.sequence, head = piece.first_head, head_dim = a.cache.head_dim;
  const QwenrtCache& cache = a.cache;
  const TileMemory m = divide_memory(memory, head_dim);
  int64_t cells_of_two[2][kTileKeys], *cells = cells_of_two[0], *next_cells = cells_of_two[1];
  const TileRows rows{piece.first_row, piece.last_row, a.num_heads / cache.num_kv_heads,
                      a.sequences.kv_lens[s] - a.sequences.q_lens[s], a.window};
  const bool codes = cache.k_scale != nullptr;
  const Side<Cell> k{static_cast<const Cell*>(cache.k) + head * head_dim, codes ? cache.k_scale + head : nullptr,
                     codes ? cache.k_zero + head : nullptr, head_dim};
  const Side<Cell> v{static_cast<const Cell*>(cache.v) + head * head_dim, codes ? cache.v_scale + head : nullptr,
                     codes ? cache.v_zero + head : nullptr, head_dim};
  begin_rows(a, s, head, rows, m);
  const int64_t begin = rows.begin(0), end = rows.end(rows.count() - 1);
  const auto find = [&](int64_t origin, int64_t* into) {
    find_cells(a, s, origin, most_of(begin, origin), least_of(end, origin + kTileKeys), kPanel, into);
  };
  find(begin / kTileKeys * kTileKeys, cells);
  const int64_t first = begin % kTileKeys;
  NextTile<Cell>{k, v, cells, first, least_of(kTileKeys, first + end - begin), kTileKeys}.ask();
  for (int64_t origin = begin / kTileKeys * kTileKeys; origin < end; origin += kTileKeys) {
    const Places seen = places(begin, end, origin);
    const Places packed{seen.begin / kPanel * kPanel, (seen.end + kPanel - 1) / kPanel * kPanel};
    pack_keys(k, cells, packed, m.keys);
    pack_values(v, cells, packed, m.values);
    NextTile<Cell> next{k, v, next_cells, 0, 0, 0};
    if (origin + kTileKeys < end) {
      find(origin + kTileKeys, next_cells);
      next.count = least_of(kTileKeys, end - origin - kTileKeys);
      next.share = kTileKeys * kPanel * kBlockRows / ((packed.end - packed.begin) * rows.padded()) + 1;
    }
    score_tile(rows, origin, packed, head_dim, m, next);
    soften_tile(rows, origin, m);
    weigh_tile(rows, origin, head_dim, m);
    int64_t* const read = cells;
    cells = next_cells;
    next_cells = read;
  }
  end_rows(a, s, head, rows, m);
}

}  // namespace
