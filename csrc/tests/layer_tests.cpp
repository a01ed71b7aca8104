// Attention over the paged cache, norm, silu and rotary of every instruction set that runs here against plain loops in
// double, through the C ABI.
#include "abi/qwenrt_layer.h"
#include "check.h"

namespace {

template <class Each>
void for_each_isa(Each each) {
  for (int i = 0; qwenrt_isa_at(i); ++i) {
    use(qwenrt_isa_at(i));
    each(qwenrt_isa_at(i));
  }
}

void check_near(double got, double wanted, double allowed, const char* isa, const char* what) {
  CHECK(fabs(got - wanted) <= allowed, "%s %s: %.9g for %.9g", isa, what, got, wanted);
}

struct Cache {
  int64_t slots, heads, dim;
  bool codes;
  std::vector<float> k, v, k_scale, k_zero, v_scale, v_zero;
  std::vector<uint8_t> k_codes, v_codes;
  QwenrtCache c{};

  Cache(int64_t blocks, int64_t block_size, int64_t heads, int64_t dim, bool codes, Random& random)
      : slots(blocks * block_size), heads(heads), dim(dim), codes(codes) {
    const int64_t cells = slots * heads;
    k = random.floats(cells * dim), v = random.floats(cells * dim);
    for (std::vector<float>* scales : {&k_scale, &k_zero, &v_scale, &v_zero}) *scales = random.floats(cells, 0.01f);
    for (std::vector<uint8_t>* all : {&k_codes, &v_codes})
      for (int64_t i = 0; i < cells * dim; ++i) all->push_back(uint8_t(random.bits()));
    c.k = codes ? static_cast<void*>(k_codes.data()) : k.data();
    c.v = codes ? static_cast<void*>(v_codes.data()) : v.data();
    if (codes)
      c.k_scale = k_scale.data(), c.k_zero = k_zero.data(), c.v_scale = v_scale.data(), c.v_zero = v_zero.data();
    c.block_size = block_size, c.num_kv_heads = heads, c.head_dim = dim;
  }
  double key(int64_t cell, int64_t i) const { return value_of(k, k_codes, k_scale, k_zero, cell, i); }
  double value(int64_t cell, int64_t i) const { return value_of(v, v_codes, v_scale, v_zero, cell, i); }

 private:
  double value_of(const std::vector<float>& x, const std::vector<uint8_t>& code, const std::vector<float>& scale,
                  const std::vector<float>& zero, int64_t cell, int64_t i) const {
    const size_t at = size_t(cell * dim + i), row = size_t(cell);
    return codes ? double(scale[row]) * code[at] + zero[row] : x[at];
  }
};

struct Case {
  int64_t kv_heads, group, dim, block_size, window;
  bool codes;
};

// out of one query over its keys; the cache's blocks are those of `table`.
std::vector<double> attend(const Cache& cache, const int64_t* table, const float* q, int64_t kv_head, int64_t position,
                           double scale, int64_t window) {
  std::vector<double> scores, out(size_t(cache.dim), 0.0);
  std::vector<int64_t> cells;
  double most = -INFINITY, total = 0;
  for (int64_t key = window && position >= window ? position - window + 1 : 0; key <= position; ++key) {
    const int64_t slot = table[key / cache.c.block_size] * cache.c.block_size + key % cache.c.block_size;
    double score = 0;
    for (int64_t i = 0; i < cache.dim; ++i) score += q[i] * cache.key(slot * cache.heads + kv_head, i);
    scores.push_back(score * scale);
    cells.push_back(slot * cache.heads + kv_head);
    most = fmax(most, scores.back());
  }
  for (double& score : scores) total += score = exp(score - most);
  for (size_t n = 0; n < scores.size(); ++n)
    for (int64_t i = 0; i < cache.dim; ++i) out[size_t(i)] += scores[n] / total * cache.value(cells[n], i);
  return out;
}

void test_attention(int count) {
  Random random(11);
  for (int n = 0; n < count; ++n) {
    const Case c{1 + random.below(3),
                 1 + random.below(4),
                 8 * (1 + random.below(8)),
                 random.one_of<int64_t>({1, 4, 16}),
                 random.one_of<int64_t>({0, 0, 5, 300}),
                 random.coin()};
    const int64_t heads = c.kv_heads * c.group, count_of_sequences = 1 + random.below(3),
                  blocks = 600 / c.block_size * 3;
    Cache cache(blocks, c.block_size, c.kv_heads, c.dim, c.codes, random);
    cache.c.rounded = random.coin();
    const double allowed = c.codes && cache.c.rounded ? 3e-4 : 2e-5;
    std::vector<int64_t> first, q_lens, kv_lens, tables, ids;
    int64_t tokens = 0;
    for (int64_t s = 0; s < count_of_sequences; ++s) {
      const int64_t q_len = random.one_of<int64_t>({1, 1, 2, 7, 40}),
                    kv_len = q_len + random.one_of<int64_t>({0, 3, 254, 500});
      first.push_back(tokens), q_lens.push_back(q_len), kv_lens.push_back(kv_len),
          tables.push_back(int64_t(ids.size()));
      for (int64_t i = 0; i * c.block_size < kv_len; ++i) ids.push_back(random.below(blocks));
      tokens += q_len;
    }
    const std::vector<float> q = random.floats(tokens * heads * c.dim);
    const float scale = 1 / sqrtf(float(c.dim));
    for_each_isa([&](const char* isa) {
      std::vector<float> out(q.size(), NAN);
      const QwenrtSequences sequences{count_of_sequences, first.data(),  q_lens.data(),
                                      kv_lens.data(),     tables.data(), ids.data()};
      CHECK(qwenrt_attention(with, &sequences, &cache.c, q.data(), heads * c.dim, heads, out.data(), scale, c.window) ==
                QWENRT_OK,
            "%s", isa);
      for (int64_t s = 0; s < count_of_sequences; ++s)
        for (int64_t j = 0; j < q_lens[size_t(s)]; ++j)
          for (int64_t h = 0; h < heads; ++h) {
            const int64_t row = ((first[size_t(s)] + j) * heads + h) * c.dim;
            const std::vector<double> wanted =
                attend(cache, ids.data() + tables[size_t(s)], q.data() + row, h / c.group,
                       kv_lens[size_t(s)] - q_lens[size_t(s)] + j, scale, c.window);
            for (int64_t i = 0; i < c.dim; ++i)
              check_near(out[size_t(row + i)], wanted[size_t(i)], allowed, isa, "attention");
          }
    });
  }
}

double silu(double x) { return x / (1 + exp(-x)); }

void test_norm_and_silu() {
  Random random(12);
  for (int64_t dim : {1, 7, 8, 9, 64, 203})
    for (int64_t rows : {0, 1, 5}) {
      const std::vector<float> x = random.floats(rows * dim, 3), weight = random.floats(dim),
                               gates = random.floats(rows * 2 * dim, 90);
      for_each_isa([&](const char* isa) {
        std::vector<float> out(size_t(rows * dim), NAN), product(out);
        qwenrt_rms_norm(with, x.data(), weight.data(), out.data(), rows, dim, 1e-6f);
        qwenrt_silu_and_mul(with, gates.data(), product.data(), rows, dim);
        for (int64_t r = 0; r < rows; ++r) {
          double squares = 0;
          for (int64_t i = 0; i < dim; ++i) squares += double(x[size_t(r * dim + i)]) * x[size_t(r * dim + i)];
          const double factor = 1 / sqrt(squares / double(dim) + 1e-6);
          for (int64_t i = 0; i < dim; ++i) {
            check_near(out[size_t(r * dim + i)], x[size_t(r * dim + i)] * factor * weight[size_t(i)], 2e-6 * 3, isa,
                       "norm");
            const double wanted = silu(gates[size_t(r * 2 * dim + i)]) * gates[size_t((r * 2 + 1) * dim + i)];
            check_near(product[size_t(r * dim + i)], wanted, 1e-6 * fabs(wanted) + 1e-30, isa, "silu");
          }
        }
      });
    }
  for_each_isa([&](const char* isa) {  // what is not finite
    const float gates[16] = {INFINITY, -INFINITY, NAN, 200, -200, 0, 1, -1, 2, 2, 2, 2, 2, 2, 2, 2};
    float out[8];
    qwenrt_silu_and_mul(with, gates, out, 1, 8);
    CHECK(out[0] == INFINITY && isnan(out[2]) && out[3] == 400 && out[5] == 0, "%s: %g %g %g %g", isa, out[0], out[2],
          out[3], out[5]);
    check_near(out[4], 0, 1e-30, isa, "silu(-200)");
  });
}

void test_rotary(bool codes, bool fitted) {
  Random random(13);
  const int64_t heads = 4, kv_heads = 2, dim = 16, rotary = 12, tokens = 4, all = heads + 2 * kv_heads;
  Cache cache(4, 2, kv_heads, dim, codes, random);
  const std::vector<float> qkv = random.floats(tokens * all * dim), cos = random.floats(tokens * rotary),
                           sin = random.floats(tokens * rotary);
  const std::vector<float> scale = random.floats(tokens), norm = random.floats(dim);
  const std::vector<int64_t> slots = {5, -1, 0, 7};
  const std::vector<float> offset = random.floats(kv_heads * dim);
  std::vector<float> factor = random.floats(kv_heads * dim);
  for (float& x : factor) x = fabsf(x) + 0.5f;
  if (fitted) cache.c.k_offset = offset.data(), cache.c.k_factor = factor.data();
  for_each_isa([&](const char* isa) {
    std::vector<float> qk(size_t(tokens * (heads + kv_heads) * dim), NAN);
    QwenrtRotary a{};
    a.qkv = qkv.data(), a.qk = qk.data(), a.q_norm = norm.data(), a.k_norm = norm.data(), a.cos = cos.data(),
    a.sin = sin.data();
    a.q_scale = scale.data(), a.slots = slots.data(), a.num_heads = heads, a.num_kv_heads = kv_heads, a.head_dim = dim;
    a.rotary_dim = rotary, a.eps = 1e-6f;
    CHECK(qwenrt_rotary_store(with, &a, &cache.c, tokens) == QWENRT_OK, "%s", isa);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads + kv_heads; ++h) {
        double x[16], squares = 0;
        for (int64_t i = 0; i < dim; ++i) x[i] = qkv[size_t((t * all + h) * dim + i)], squares += x[i] * x[i];
        for (int64_t i = 0; i < dim; ++i) x[i] *= norm[size_t(i)] / sqrt(squares / double(dim) + 1e-6);
        for (int64_t i = 0; i < dim; ++i) {
          const double other = i < rotary / 2 ? -x[i + rotary / 2] : (i < rotary ? x[i - rotary / 2] : 0);
          double wanted = i < rotary ? x[i] * cos[size_t(t * rotary + i)] + other * sin[size_t(t * rotary + i)] : x[i];
          if (h < heads) wanted *= scale[size_t(t)];
          const size_t place = size_t((h < heads ? h / (heads / kv_heads) : h - heads) * dim + i);
          if (fitted) wanted = h < heads ? wanted * factor[place] : (wanted - offset[place]) / factor[place];
          check_near(qk[size_t((t * (heads + kv_heads) + h) * dim + i)], wanted, 5e-6, isa, "rotary");
        }
      }
      for (int64_t h = 0; slots[size_t(t)] >= 0 && h < kv_heads; ++h)
        for (int64_t i = 0; i < dim; ++i) {
          const int64_t cell = slots[size_t(t)] * kv_heads + h;
          check_near(cache.key(cell, i), qk[size_t((t * (heads + kv_heads) + heads + h) * dim + i)],
                     fitted  ? 0.06
                     : codes ? 0.02
                             : 0,
                     isa, "stored key");
          check_near(cache.value(cell, i), qkv[size_t((t * all + heads + kv_heads + h) * dim + i)], codes ? 0.005 : 0,
                     isa, "stored value");
        }
    }
  });
}

// One pair of one adapter, with its memory: exactly as much as it may read.
struct Pair {
  std::vector<float> a, b, row_scale, bias, added;
  QwenrtLora l{};

  Pair(int64_t inputs, int64_t first_row, int64_t rows, int64_t first_token, int64_t last_token, Random& random)
      : a(), b() {
    l.rank = random.below(21), l.rows = rows, l.scale = 0.5f;
    l.first_row = first_row, l.first_token = first_token, l.last_token = last_token;
    a = random.floats(l.rank * inputs), b = random.floats(l.rank * rows);
    row_scale = random.floats(rows, 2), bias = random.floats(rows), added = random.floats(rows);
    l.a = a.data(), l.b = b.data();
    if (random.coin()) l.row_scale = row_scale.data();
    if (random.coin()) l.bias = bias.data();
    if (random.coin()) l.added = added.data();
  }

  double changed(const float* x, int64_t inputs, double own, int64_t row) const {
    double update = 0;
    for (int64_t r = 0; r < l.rank; ++r) {
      double inner = 0;
      for (int64_t i = 0; i < inputs; ++i) inner += double(a[size_t(r * inputs + i)]) * x[i];
      update += inner * double(l.scale) * b[size_t(r * l.rows + row)];
    }
    if (l.row_scale) {
      const double plain = l.bias ? own - bias[size_t(row)] : own, factor = row_scale[size_t(row)];
      update = (factor - 1) * plain + factor * update;
    }
    return own + update + (l.added ? added[size_t(row)] : 0);
  }
};

// Two adapters, each with pairs for two parts of the outputs; tokens and outputs of none keep their bits, and a token
// has the same alone.
void test_lora(int count) {
  Random random(23);
  for (int n = 0; n < count; ++n) {
    const int64_t inputs = 1 + random.below(90), tokens = 3 + random.below(40), outputs = 4 + random.below(100);
    const int64_t cut = 1 + random.below(outputs - 2), gap = random.below(2);
    const int64_t from = random.below(tokens), to = from + random.below(tokens - from);
    std::vector<Pair> pairs;
    pairs.reserve(4);
    for (const auto& own : {std::pair<int64_t, int64_t>(0, from), std::pair<int64_t, int64_t>(to, tokens)}) {
      pairs.emplace_back(inputs, 0, cut, own.first, own.second, random);
      pairs.emplace_back(inputs, cut + gap, outputs - cut - gap, own.first, own.second, random);
    }
    std::vector<QwenrtLora> loras;
    for (const Pair& pair : pairs) loras.push_back(pair.l);
    const std::vector<float> x = random.floats(tokens * inputs), own = random.floats(tokens * outputs);
    for_each_isa([&](const char* isa) {
      std::vector<float> y = own;
      CHECK(!qwenrt_lora(with, loras.data(), 4, x.data(), inputs, y.data(), outputs, tokens), "%s", isa);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < outputs; ++i) {
          const size_t at = size_t(t * outputs + i);
          double wanted = own[at];
          bool nobodys = true;
          for (const Pair& pair : pairs)
            if (t >= pair.l.first_token && t < pair.l.last_token && i >= pair.l.first_row &&
                i < pair.l.first_row + pair.l.rows) {
              wanted = pair.changed(x.data() + t * inputs, inputs, wanted, i - pair.l.first_row);
              nobodys = false;
            }
          check_near(y[at], wanted, nobodys ? 0 : 1e-4 + 1e-5 * fabs(wanted), isa, "what an adapter adds");
        }
      const int64_t t = random.below(tokens);
      for (QwenrtLora l : loras) {
        const bool its = t >= l.first_token && t < l.last_token;
        l.first_token = 0, l.last_token = 1;
        std::vector<float> alone(own.begin() + t * outputs, own.begin() + (t + 1) * outputs);
        if (!its) continue;
        CHECK(!qwenrt_lora(with, &l, 1, x.data() + t * inputs, inputs, alone.data(), outputs, 1), "%s", isa);
        const size_t first = size_t(l.first_row), bytes = size_t(l.rows) * sizeof(float);
        CHECK(!memcmp(alone.data() + first, y.data() + size_t(t * outputs) + first, bytes), "%s: a token alone", isa);
      }
    });
    for (int64_t QwenrtLora::*field : {&QwenrtLora::rank, &QwenrtLora::last_token, &QwenrtLora::first_row}) {
      std::vector<float> y = own;
      QwenrtLora l = loras[3];
      l.*field += QWENRT_LORA_RANK + 1;
      CHECK(qwenrt_lora(with, &l, 1, x.data(), inputs, y.data(), outputs, tokens) == QWENRT_BAD_ARGUMENT, "refused");
      CHECK(y == own, "and nothing written");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  use("auto");
  test_attention(count > 1 ? atoi(arguments[1]) : 12);
  test_norm_and_silu();
  test_lora(count > 1 ? atoi(arguments[1]) : 12);
  test_rotary(false, false);
  test_rotary(true, false);
  test_rotary(true, true);
  printf("layers:");
  for (int i = 0; qwenrt_isa_at(i); ++i) printf(" %s", qwenrt_isa_at(i));
  printf(": ok\n");
  return 0;
}
