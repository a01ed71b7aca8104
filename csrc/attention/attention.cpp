// Attention over the paged cache: cuts sequences into pieces and shares them between the threads.
#include <string.h>

#include <atomic>

#include "abi/dispatch.h"
#include "pool/scratch.h"
#include "pool/thread_pool.h"

namespace {

constexpr int64_t kSmallWork = 64 * 1024;  // multiply-adds below which waking the workers costs more than it saves
constexpr int64_t kFewRows = 48;           // tiles are not made smaller for the sake of more pieces

Scratch scratch;

struct Span {  // the chunks that a short query's sequence needs
  int64_t first_chunk, chunks;
};

Span span_of(const Attention& a, int64_t s) {
  const int64_t q_len = a.sequences.q_lens[s], kv_len = a.sequences.kv_lens[s];
  const int64_t seen = a.window ? kv_len - q_len - a.window + 1 : 0;
  const int64_t first = (seen > 0 ? seen : 0) / kChunk;
  return {first, (kv_len - 1) / kChunk + 1 - first};
}

Partials from_row(const Partials& p, int64_t row, int64_t head_dim) {
  return {p.largest + row, p.sums + row, p.values + row * head_dim};
}

// How the sequences are cut. The cuts follow the threads; what a row gives does not depend on them.
struct Cuts {
  int64_t parts = 1;      // of a chunk's key heads
  int64_t tiles = 1;      // of a long query's rows, at least
  int64_t pieces = 0, counters = 0, rows = 0;  // rows: of the partials
  int64_t work = 0;       // multiply-adds
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tile_rows(const Attention& a, const Cuts& cuts, int64_t s) {
  const int64_t rows = a.sequences.q_lens[s] * (a.num_heads / a.cache.num_kv_heads);
  int64_t tiles = ceil_div(rows, kFewRows) < cuts.tiles ? ceil_div(rows, kFewRows) : cuts.tiles;
  if (tiles < ceil_div(rows, kTileRows)) tiles = ceil_div(rows, kTileRows);
  return ceil_div(ceil_div(rows, tiles), kBlockRows) * kBlockRows;
}

Cuts cut(const Attention& a, int64_t threads) {
  const int64_t heads = a.cache.num_kv_heads;
  Cuts cuts;
  int64_t chunks = 0;
  for (int64_t s = 0; s < a.sequences.count; ++s) {
    const int64_t q_len = a.sequences.q_lens[s], kv_len = a.sequences.kv_lens[s];
    if (q_len <= 0) continue;
    const int64_t seen = a.window && a.window + q_len < kv_len ? a.window + q_len : kv_len;
    cuts.work += 2 * q_len * seen * a.num_heads * a.cache.head_dim;
    if (q_len <= kShortQuery) chunks += span_of(a, s).chunks;
  }
  int64_t each = cuts.work / kSmallWork;  // pieces of a thread
  if (each > kTasksPerThread) each = kTasksPerThread;
  const int64_t wanted = threads > 1 && each > 0 ? threads * each : 1;
  if (chunks) cuts.parts = wanted < chunks ? 1 : (ceil_div(wanted, chunks) < heads ? ceil_div(wanted, chunks) : heads);
  cuts.tiles = ceil_div(wanted, heads);
  for (int64_t s = 0; s < a.sequences.count; ++s) {
    const int64_t q_len = a.sequences.q_lens[s];
    if (q_len <= 0) continue;
    if (q_len > kShortQuery) {
      cuts.pieces += heads * ceil_div(q_len * (a.num_heads / heads), tile_rows(a, cuts, s));
      continue;
    }
    const Span span = span_of(a, s);
    cuts.pieces += span.chunks * cuts.parts;
    if (span.chunks == 1) continue;
    cuts.counters += cuts.parts;
    cuts.rows += span.chunks * q_len * a.num_heads;
  }
  return cuts;
}

struct AttentionTask {
  Attention a;
  Cuts cuts;
  AttentionPiece* pieces;
  std::atomic<int64_t>* left;  // [counters]: chunks that are not finished
  Partials partials;
  float* memory;  // [workers][attention_memory()]
  const LayerKernels* kernels;
  std::atomic<int64_t> next{0};
};

void add_chunks(AttentionTask& t, int64_t s, AttentionPiece*& piece, int64_t& counter, int64_t& row) {
  const int64_t heads = t.a.cache.num_kv_heads, parts = t.cuts.parts;
  const Span span = span_of(t.a, s);
  const bool alone = span.chunks == 1;
  for (int64_t chunk = 0; chunk < span.chunks; ++chunk) {
    for (int64_t part = 0; part < parts; ++part)
      *piece++ = {s, heads * part / parts, heads * (part + 1) / parts, span.first_chunk + chunk, 0, 0,
                  alone ? -1 : row, alone ? -1 : counter + part};
    if (!alone) row += t.a.sequences.q_lens[s] * t.a.num_heads;
  }
  for (int64_t part = 0; !alone && part < parts; ++part)
    t.left[counter++].store(span.chunks, std::memory_order_relaxed);
}

// The last rows see most keys and come first.
void add_tiles(AttentionTask& t, int64_t s, AttentionPiece*& piece) {
  const int64_t heads = t.a.cache.num_kv_heads, rows = t.a.sequences.q_lens[s] * (t.a.num_heads / heads);
  const int64_t size = tile_rows(t.a, t.cuts, s);
  for (int64_t tile = ceil_div(rows, size) - 1; tile >= 0; --tile)
    for (int64_t head = 0; head < heads; ++head)
      *piece++ = {s, head, head + 1, 0, tile * size, (tile + 1) * size < rows ? (tile + 1) * size : rows, -1, -1};
}

void add_pieces(AttentionTask& t) {
  AttentionPiece* piece = t.pieces;
  int64_t counter = 0, row = 0;
  for (int64_t s = 0; s < t.a.sequences.count; ++s)
    if (t.a.sequences.q_lens[s] > kShortQuery) add_tiles(t, s, piece);
  for (int64_t s = 0; s < t.a.sequences.count; ++s)
    if (t.a.sequences.q_lens[s] > 0 && t.a.sequences.q_lens[s] <= kShortQuery) add_chunks(t, s, piece, counter, row);
}

// Whoever finishes the last chunk of these heads.
void combine_heads(const AttentionTask& t, const AttentionPiece& piece) {
  const int64_t s = piece.sequence, q_len = t.a.sequences.q_lens[s], dim = t.a.cache.head_dim;
  const int64_t rows = q_len * t.a.num_heads, group = t.a.num_heads / t.a.cache.num_kv_heads;
  const Span span = span_of(t.a, s);
  const Partials partials = from_row(t.partials, piece.partials - (piece.chunk - span.first_chunk) * rows, dim);
  float* out = t.a.out + t.a.sequences.first_tokens[s] * t.a.num_heads * dim;
  for (int64_t token = 0; token < q_len; ++token)
    for (int64_t head = piece.first_head * group; head < piece.last_head * group; ++head) {
      const int64_t row = token * t.a.num_heads + head;
      t.kernels->combine(partials, row, span.chunks, rows, dim, out + row * dim);
    }
}

void attention_worker(void* context, int64_t worker) {
  AttentionTask& t = *static_cast<AttentionTask*>(context);
  float* memory = t.memory + worker * attention_memory(t.a.cache.head_dim);
  for (;;) {
    const int64_t i = t.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= t.cuts.pieces) return;
    const AttentionPiece& piece = t.pieces[i];
    t.kernels->attend(t.a, piece, t.partials, memory);
    if (piece.left >= 0 && t.left[piece.left].fetch_sub(1, std::memory_order_acq_rel) == 1) combine_heads(t, piece);
  }
}

}  // namespace

int64_t layer_tasks(int64_t most, int64_t work) {
  const int64_t threads = pool_threads();
  if (threads == 1 || work < kSmallWork || most < 1) return 1;
  return most < threads * kTasksPerThread ? most : threads * kTasksPerThread;
}

int qwenrt_attention(const QwenrtHandle* with, const QwenrtSequences* sequences, const QwenrtCache* cache,
                     const float* q, int64_t q_stride, int64_t num_heads, float* out, float scale, int64_t window) {
  const int64_t dim = cache->head_dim;
  if (dim < 8 || dim > 256 || dim % 8 || cache->num_kv_heads < 1 || num_heads % cache->num_kv_heads)
    return QWENRT_BAD_ARGUMENT;
  PoolLock lock(with->threads);
  AttentionTask t{{*sequences, *cache, q, out, q_stride, num_heads, window, scale}, {}, nullptr, nullptr, {}, nullptr,
                  layer_kernels(*with)};
  int64_t threads = pool_threads();
  t.cuts = cut(t.a, threads);
  if (!t.cuts.pieces) return QWENRT_OK;
  if (t.cuts.work < kSmallWork) threads = 1;
  if (threads > t.cuts.pieces) threads = t.cuts.pieces;
  const int64_t rows = t.cuts.rows;
  if (!scratch.room(array(t.memory, threads * attention_memory(dim)), array(t.partials.values, rows * dim),
                    array(t.partials.largest, rows), array(t.partials.sums, rows), array(t.left, t.cuts.counters),
                    array(t.pieces, t.cuts.pieces)))
    return QWENRT_NO_MEMORY;
  add_pieces(t);
  parallel_for(threads, attention_worker, &t);
  return QWENRT_OK;
}
