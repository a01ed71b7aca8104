// Every linear of every instruction set that runs here against plain loops in double, through the C ABI.
#include "abi/qwenrt_cpu.h"
#include "check.h"

namespace {

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                     : ldexp(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25);
  return float(h & 0x8000 ? -size : size);
}

float bfloat_to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t random_half(Random& random) {  // up to 2 in size, subnormals included
  const uint32_t bits = random.bits();
  return uint16_t((bits & 0x83ff) | (bits >> 16) % 17 << 10);
}

uint16_t random_bfloat(Random& random) {
  return uint16_t((random.bits() & 0x807f) | uint32_t(110 + random.below(18)) << 7);
}

struct Shape {
  int64_t n, k, group;
  int bits;
  bool perm, zeros, float_scales, bias;
};

struct Weight {
  Shape shape;
  QwenrtQuantMatrix matrix{};
  std::vector<uint8_t> codes;  // [k][n]
  std::vector<uint32_t> words;
  std::vector<uint16_t> half_scales, zeros;
  std::vector<float> float_scales, float_zeros, bias;
  std::vector<int32_t> perm;

  Weight(const Shape& s, Random& random, int extreme = 0) : shape(s) {
    const int64_t blocks = (s.n + QWENRT_BLOCK - 1) / QWENRT_BLOCK, groups = (s.k + s.group - 1) / s.group;
    const int64_t per_group = (s.group * s.bits + 31) / 32, cells = blocks * groups * QWENRT_BLOCK;
    for (int64_t i = 0; i < s.k * s.n; ++i)
      codes.push_back(uint8_t(extreme == 1 ? (1 << s.bits) - 1 : (extreme == 2 ? 0 : random.below(1 << s.bits))));
    words.assign(size_t(blocks * groups * per_group * QWENRT_BLOCK), 0xffffffff);
    CHECK(qwenrt_pack(with, codes.data(), words.data(), s.k, s.n, s.group, s.bits) == QWENRT_OK, "pack");
    for (int64_t i = 0; i < cells; ++i) {
      half_scales.push_back(extreme ? 0x1c00 : random_half(random));  // 2^-8
      float_scales.push_back(extreme ? 0.00390625f : random.uniform() * 1e-9f);
      zeros.push_back(uint16_t(extreme == 1 ? 0 : (extreme ? 1 << s.bits : random.below((1 << s.bits) + 1))));
      float_zeros.push_back(extreme ? zeros.back() : float(zeros.back()) + random.uniform() / 2);
    }
    for (int64_t i = 0; i < s.n; ++i) bias.push_back(random.uniform());
    for (int64_t i = 0; i < s.k; ++i) perm.push_back(int32_t(i));
    for (int64_t i = s.k - 1; i > 0; --i) std::swap(perm[size_t(i)], perm[size_t(random.below(i + 1))]);
    matrix.words = words.data();
    matrix.scales = s.float_scales ? static_cast<const void*>(float_scales.data()) : half_scales.data();
    matrix.scales_are_float = s.float_scales;
    matrix.zeros_are_float = s.zeros && s.float_scales;  // as offsets of GGUF files become
    matrix.zeros = !s.zeros ? nullptr : s.float_scales ? static_cast<const void*>(float_zeros.data()) : zeros.data();
    matrix.zero = extreme == 1 ? 0 : 1 << (s.bits - 1);
    if (!s.zeros && !s.float_scales && s.bits == 4 && !extreme) matrix.zero = QWENRT_ZEROS_IN_SCALES;
    matrix.perm = s.perm ? perm.data() : nullptr;
    matrix.bias = s.bias ? bias.data() : nullptr;
    matrix.out_features = s.n, matrix.in_features = s.k, matrix.bits = s.bits;
    matrix.groups = groups, matrix.group_size = s.group, matrix.words_per_group = per_group;
  }

  double scale(int64_t row, int64_t g) const {
    const size_t i = size_t((row / QWENRT_BLOCK * matrix.groups + g) * QWENRT_BLOCK + row % QWENRT_BLOCK);
    return shape.float_scales ? float_scales[i] : half_to_float(half_scales[i]);
  }
  double value(int64_t row, int64_t i) const {  // of the i-th input in the order of the codes
    const int64_t g = i / shape.group;
    const size_t at = size_t((row / QWENRT_BLOCK * matrix.groups + g) * QWENRT_BLOCK + row % QWENRT_BLOCK);
    const int alike = matrix.zero == QWENRT_ZEROS_IN_SCALES ? half_scales[at] & 15 : matrix.zero;
    const double zero = !shape.zeros ? alike : shape.float_scales ? double(float_zeros[at]) : zeros[at];
    return scale(row, g) * (codes[size_t(i * shape.n + row)] - zero);
  }
  int64_t input(int64_t i) const { return shape.perm ? perm[size_t(i)] : i; }
};

// y and the size that errors are measured by, both in double. How activations are rounded is checked by its effect:
// half a step of its block for each input.
void check_against_double(const Weight& w, const std::vector<float>& x, const std::vector<float>& y, int64_t tokens,
                          int activations, const char* isa, double exactness) {
  const double step =
      activations == QWENRT_EXACT ? 0 : 0.5001 / (activations == QWENRT_INT8 && w.shape.bits == 4 ? 127 : 32639);
  const int64_t block = w.shape.bits == 4 ? 32 : 128;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> rounding(size_t(w.shape.k));
    for (int64_t g = 0; g < w.matrix.groups; ++g)
      for (int64_t first = g * w.shape.group; first < (g + 1) * w.shape.group && first < w.shape.k; first += block) {
        int64_t last = first + block < (g + 1) * w.shape.group ? first + block : (g + 1) * w.shape.group;
        if (last > w.shape.k) last = w.shape.k;
        double largest = 0;
        for (int64_t i = first; i < last; ++i)
          largest = fmax(largest, fabs(double(x[size_t(t * w.shape.k + w.input(i))])));
        for (int64_t i = first; i < last; ++i) rounding[size_t(i)] = largest * step;
      }
    for (int64_t n = 0; n < w.shape.n; ++n) {
      double wanted = w.shape.bias ? w.bias[size_t(n)] : 0, size = fabs(wanted) + 1e-12, allowed = 0;
      for (int64_t i = 0; i < w.shape.k; ++i) {
        const double value = w.value(n, i), in = x[size_t(t * w.shape.k + w.input(i))];
        wanted += value * in;
        // Codes and zeros are summed apart, and each has its share of the error.
        size += fabs(in) * fabs(w.scale(n, i / w.shape.group)) * (2 << w.shape.bits);
        allowed += fabs(value) * rounding[size_t(i)];
      }
      const double error = fabs(y[size_t(t * w.shape.n + n)] - wanted);
      CHECK(error <= allowed * 1.001 + size * exactness,
            "%s n=%d k=%d group=%d bits=%d tokens=%d mode=%d: row %d of token %d: %g for %g", isa, int(w.shape.n),
            int(w.shape.k), int(w.shape.group), w.shape.bits, int(tokens), activations, int(n), int(t),
            y[size_t(t * w.shape.n + n)], wanted);
    }
  }
}

// The upper half of a larger matrix has int16 whatever is asked.
int quant_linear(const Weight& w, const float* x, float* y, int64_t tokens, int activations) {
  QwenrtActivations how = rounded(activations);
  if (w.shape.n > 40) how.narrow_rows = w.shape.n / 2 / QWENRT_BLOCK * QWENRT_BLOCK;
  const QwenrtLinear linear{QWENRT_QUANTIZED, 0, &w.matrix, nullptr, 0, w.shape.n, w.shape.k, how};
  return qwenrt_linear(with, &linear, x, y, tokens);
}

std::vector<float> run(const Weight& w, const std::vector<float>& x, int64_t tokens, int activations) {
  std::vector<float> y(size_t(tokens * w.shape.n), NAN);
  CHECK(quant_linear(w, x.data(), y.data(), tokens, activations) == QWENRT_OK, "tokens %d", int(tokens));
  return y;
}

bool same_bits(const float* a, const float* b, size_t count) {
  return count == 0 || memcmp(a, b, count * sizeof(float)) == 0;
}

template <class Each>
void for_each_isa(Each each) {
  for (int i = 0; qwenrt_isa_at(i); ++i) {
    use(qwenrt_isa_at(i));
    CHECK(strcmp(qwenrt_isa(with), qwenrt_isa_at(i)) == 0, "%s", qwenrt_isa(with));
    each(qwenrt_isa(with));
  }
}

constexpr double kExactness = 1e-6;  // float32 sums in any order, of terms of either sign
constexpr double kSequential = 3e-6;  // one after the other

void check_weight(const Weight& w, const std::vector<float>& x, int64_t tokens, double exactness = kExactness) {
  for (int activations : {QWENRT_EXACT, QWENRT_INT16, QWENRT_INT8}) {
    std::vector<float> scalar;
    use("scalar");
    if (activations != QWENRT_EXACT) scalar = run(w, x, tokens, activations);
    for_each_isa([&](const char* isa) {
      const std::vector<float> y = run(w, x, tokens, activations);
      check_against_double(w, x, y, tokens, activations, isa, exactness);
      if (activations != QWENRT_EXACT)
        CHECK(same_bits(y.data(), scalar.data(), y.size()),
              "%s and scalar differ: n=%d k=%d group=%d bits=%d tokens=%d mode=%d", isa, int(w.shape.n), int(w.shape.k),
              int(w.shape.group), w.shape.bits, int(tokens), activations);
      for (int64_t t = 0; t < tokens && t < 3 && activations != QWENRT_EXACT; ++t) {  // alone as in a batch
        const std::vector<float> row(x.begin() + t * w.shape.k, x.begin() + (t + 1) * w.shape.k);
        CHECK(same_bits(run(w, row, 1, activations).data(), y.data() + t * w.shape.n, size_t(w.shape.n)), "%s token %d",
              isa, int(t));
      }
    });
  }
}

void test_shapes(int count) {
  Random random(1);
  for (int i = 0; i < count; ++i) {
    const int64_t n = random.coin() ? 1 + random.below(40) : random.one_of<int64_t>({1, 7, 8, 9, 64, 201});
    const int64_t k = random.coin() ? 1 + random.below(140) : random.one_of<int64_t>({1, 3, 128, 259, 517});
    const int64_t group = random.one_of<int64_t>({k, 8, 20, 24, 31, 32, 64, 128, 200});
    const Shape shape{
        n, k, group, random.coin() ? 4 : 8, random.coin(), random.coin(), random.below(4) == 0, random.coin()};
    const int64_t tokens = random.one_of<int64_t>({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 33});
    const Weight w(shape, random);
    std::vector<float> x = random.floats(tokens * k, ldexpf(1, int(random.below(20)) - 10));
    for (size_t at = 0; random.coin() && at < x.size(); at += size_t(1 + random.below(60))) x[at] *= 1000;  // outliers
    check_weight(w, x, tokens);
  }
}

// Codes, zeros and activations at their largest: no integer sum may overflow.
void test_extremes() {
  Random random(2);
  for (int bits : {4, 8})
    for (int extreme : {1, 2, 3})
      for (const auto& [k, group] : {std::pair<int64_t, int64_t>{5000, 5000}, {256, 128}, {40, 40}})
        for (float size : {1e6f, -1e6f, 1e-20f}) {
          const Weight w({9, k, group, bits, false, true, false, false}, random, extreme);
          for (int64_t tokens : {1, 2, 5}) {
            std::vector<float> x(size_t(tokens * k), size);
            if (extreme == 3)  // alternating signs
              for (size_t i = 0; i < x.size(); i += 2) x[i] = -size;
            check_weight(w, x, tokens, 2e-5);  // equal terms: every rounding goes the same way
          }
        }
}

void test_what_is_not_finite() {
  Random random(3);
  const Weight w({20, 70, 32, 4, false, true, false, true}, random);
  for_each_isa([&](const char* isa) {
    for (int activations : {QWENRT_EXACT, QWENRT_INT16, QWENRT_INT8})
      for (float bad : {INFINITY, -INFINITY, NAN, 3.3e38f})
        for (int64_t tokens : {1, 2, 9}) {
          std::vector<float> x = random.floats(tokens * 70), y(size_t(tokens * 20));
          x[size_t(random.below(tokens * 70))] = bad;
          CHECK(quant_linear(w, x.data(), y.data(), tokens, activations) == QWENRT_NOT_FINITE,
                "%s mode %d: %g", isa, activations, bad);
        }
  });
}

// Zeros, and activations so small that they count as zeros: the bias alone, bit for bit.
void test_nothing() {
  Random random(4);
  const Weight w({20, 300, 64, 4, false, true, false, true}, random);
  for_each_isa([&](const char* isa) {
    for (int activations : {QWENRT_INT16, QWENRT_INT8})
      for (float nothing : {0.0f, -0.0f, 1e-45f, 1e-38f, 7e-31f}) {
        const std::vector<float> y = run(w, std::vector<float>(600, nothing), 2, activations);
        for (int i = 0; i < 40; ++i)
          CHECK(y[size_t(i)] == w.bias[size_t(i % 20)], "%s %g gives %g", isa, nothing, y[size_t(i)]);
      }
  });
}

QwenrtLinear dense16(const std::vector<uint16_t>& w, const float* bias, int64_t n, int64_t k, bool is_half,
                     bool may_round) {
  const int kind = is_half ? QWENRT_DENSE_FLOAT16 : QWENRT_DENSE_BFLOAT16;
  return {kind, 0, w.data(), bias, 0, n, k, rounded(may_round ? QWENRT_INT16 : QWENRT_EXACT)};
}

void test_dense16(int count) {
  Random random(5);
  for (int i = 0; i < count; ++i) {
    const int64_t n = 1 + random.below(30),
                  k = random.coin() ? 1 + random.below(100) : random.one_of<int64_t>({64, 129, 256, 288, 300, 512});
    const int64_t tokens = random.one_of<int64_t>({0, 1, 2, 3, 4, 5, 9, 16, 31, 33, 50});
    const bool may_round = random.coin();
    const bool is_half = random.coin(), has_bias = random.coin();
    std::vector<uint16_t> w(size_t(n * k));
    for (uint16_t& value : w) value = is_half ? random_half(random) : random_bfloat(random);
    const std::vector<float> x = random.floats(tokens * k), bias = random.floats(n);
    for_each_isa([&](const char* isa) {
      std::vector<float> y(size_t(tokens * n), NAN);
      const float* const b = has_bias ? bias.data() : nullptr;
      const QwenrtLinear linear = dense16(w, b, n, k, is_half, may_round);
      CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), tokens) == QWENRT_OK, "%s", isa);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < n; ++r) {
          double wanted = b ? b[r] : 0, size = fabs(wanted) + 1e-12, sizes = 0, largest_w = 0, largest_x = 0;
          for (int64_t c = 0; c < k; ++c) {
            const uint16_t raw = w[size_t(r * k + c)];
            const double weight = is_half ? half_to_float(raw) : bfloat_to_float(raw), value = x[size_t(t * k + c)];
            wanted += weight * value, size += fabs(weight * value), sizes += fabs(weight) + fabs(value);
            largest_w = fmax(largest_w, fabs(weight)), largest_x = fmax(largest_x, fabs(value));
          }
          // In fixed point each is half a step off at most, of the 8191 up to the largest; split, each x keeps 16 bits.
          const bool splits = strcmp(isa, "amx") == 0;
          const double fixed = tokens >= 32 ? sizes * fmax(largest_w, largest_x) / 8191 : 0;
          const double step = !may_round ? 0 : splits ? (is_half ? 0 : size * ldexp(1, -16)) : fixed;
          CHECK(fabs(y[size_t(t * n + r)] - wanted) <= size * kExactness + step,
                "%s n=%d k=%d tokens=%d half=%d rounded=%d: %g for %g", isa, int(n), int(k), int(tokens), is_half,
                may_round, y[size_t(t * n + r)], wanted);
        }
    });
  }
}

// A bfloat16 matrix in 12 bits, and all that the struct points at, on the heap so that a sanitizer sees a read past it.
struct Short {
  std::vector<uint8_t> chunks;
  std::vector<int32_t> first, inputs;
  std::vector<uint16_t> weights;
  QwenrtDense12 matrix{};

  Short(const std::vector<uint16_t>& w, const std::vector<float>& bias, int64_t n, int64_t k, int64_t smallest) {
    chunks.resize(size_t(n * ((k + QWENRT_CHUNK - 1) / QWENRT_CHUNK) * QWENRT_CHUNK_BYTES));
    first.resize(size_t(n + 1));
    matrix = {chunks.data(), bias.empty() ? nullptr : bias.data(), first.data(), nullptr, nullptr, n, k, smallest};
    CHECK(qwenrt_dense12_pack(with, w.data(), &matrix) == QWENRT_OK, "pack");
    inputs.resize(size_t(first.back())), weights.resize(size_t(first.back()));
    matrix.inputs = inputs.data(), matrix.weights = weights.data();
    CHECK(qwenrt_dense12_pack_others(with, w.data(), &matrix) == QWENRT_OK, "pack others");
  }
};

// Packed by any set, a matrix is the same, comes back as it was and gives what its 16 bits give, however many of its
// weights have no code.
void test_dense12(int count) {
  Random random(6);
  for (int i = 0; i < count; ++i) {
    const int64_t n = 1 + random.below(60),
                  k = random.coin() ? 1 + random.below(200) : random.one_of<int64_t>({64, 128, 192, 300});
    const int64_t tokens = random.one_of<int64_t>({0, 1, 2, 3, 4, 5, 7, 9, 15, 16, 33});
    const int64_t smallest = random.one_of<int64_t>({55, 56, 52, 0, 120});
    const bool has_bias = random.coin(), some = random.coin(), may_round = random.coin();
    const int64_t begin = random.below(n);
    std::vector<uint16_t> w(size_t(n * k));
    for (uint16_t& value : w) {
      value = random_bfloat(random);
      if (some && random.below(9)) value = uint16_t((value & 0x80ff) | (56 + random.below(4)) << 8);
    }
    const std::vector<float> x = random.floats(tokens * k), bias = random.floats(has_bias ? n : 0);
    std::vector<uint8_t> chunks;
    for_each_isa([&](const char* isa) {
      const Short m(w, bias, n, k, smallest);
      CHECK(chunks.empty() || chunks == m.chunks, "%s packs otherwise", isa);
      chunks = m.chunks;
      std::vector<uint16_t> back(size_t((n - begin) * k));
      CHECK(qwenrt_dense12_unpack(with, &m.matrix, back.data(), begin, n) == QWENRT_OK, "unpack");
      CHECK(memcmp(back.data(), w.data() + begin * k, back.size() * sizeof back[0]) == 0, "%s n=%d k=%d: not as it was",
            isa, int(n), int(k));
      std::vector<float> y(size_t(tokens * n), NAN);
      const bool splits = strcmp(isa, "amx") == 0;
      const int how = splits && may_round ? QWENRT_INT16 : QWENRT_EXACT;
      const QwenrtLinear linear{QWENRT_DENSE12, 0, &m.matrix, nullptr, 0, n, k, rounded(how)};
      CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), tokens) == QWENRT_OK, "%s", isa);
      const double most = kSequential + (splits && may_round ? ldexp(1, -16) : 0);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < n; ++r) {
          double sum = has_bias ? bias[size_t(r)] : 0, size = fabs(sum) + 1e-12;
          for (int64_t c = 0; c < k; ++c) {
            const double weight = bfloat_to_float(w[size_t(r * k + c)]), product = weight * x[size_t(t * k + c)];
            // A weight without a code is added to what stands in for it.
            sum += product,
                size += fabs(product) + fabs(bfloat_to_float(uint16_t(smallest << 8)) * x[size_t(t * k + c)]);
          }
          CHECK(fabs(y[size_t(t * n + r)] - sum) <= size * most, "%s n=%d k=%d tokens=%d rounded=%d: %g for %g", isa,
                int(n), int(k), int(tokens), may_round, y[size_t(t * n + r)], sum);
        }
    });
  }
  QwenrtDense12 out_of_range{};
  for (int64_t smallest : {-1, 121}) {
    out_of_range.smallest = smallest;
    CHECK(qwenrt_dense12_pack(with, nullptr, &out_of_range) == QWENRT_BAD_ARGUMENT, "smallest %d", int(smallest));
  }
}

// All 65536 patterns of both formats, one product each: the conversion itself, infinities and NaN included.
void test_every_16_bit_value() {
  std::vector<uint16_t> w(1 << 16);
  for (size_t i = 0; i < w.size(); ++i) w[i] = uint16_t(i);
  for_each_isa([&](const char* isa) {
    for (int is_half : {0, 1})
      for (int64_t k : {1, 32}) {  // scalar tails, and vectors in which one input counts
        const int64_t n = int64_t(w.size()) / k;
        for (int64_t place = 0; place < k; ++place) {
          std::vector<float> x(size_t(k), 0.0f), y(static_cast<size_t>(n));
          x[size_t(place)] = 1;
          const QwenrtLinear linear = dense16(w, nullptr, n, k, is_half, false);
          CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), 1) == QWENRT_OK, "%s", isa);
          for (int64_t r = 0; r < n; ++r) {
            bool finite = true;
            for (int64_t c = 0; c < k; ++c) {
              const uint16_t raw = w[size_t(r * k + c)];
              finite = finite && isfinite(is_half ? half_to_float(raw) : bfloat_to_float(raw));
            }
            const uint16_t raw = w[size_t(r * k + place)];
            const float wanted = is_half ? half_to_float(raw) : bfloat_to_float(raw), got = y[size_t(r)];
            if (finite || k == 1)
              CHECK(got == wanted || (isnan(got) && isnan(wanted)), "%s %04x: %g for %g", isa, raw, got, wanted);
            else
              CHECK(isnan(got) || isinf(got), "%s row %d: %g", isa, int(r), got);
          }
        }
      }
  });
}

// What a linear's kind must be, and what its parts may be.
void test_refusals() {
  const std::vector<uint16_t> w(8 * 8, 0x3f80);
  const std::vector<float> x(2 * 8, 1.0f);
  std::vector<float> y(2 * 16, NAN);
  QwenrtLinear parts[2] = {dense16(w, nullptr, 8, 8, false, false), dense16(w, nullptr, 8, 8, false, false)};
  QwenrtLinear linear{QWENRT_PARTS, 0, parts, nullptr, 2, 16, 8, {}};
  CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), 2) == QWENRT_OK && y[31] == 8, "parts: %g", y[31]);
  parts[1].kind = QWENRT_PARTS;
  CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), 2) == QWENRT_BAD_ARGUMENT, "parts of parts");
  linear.kind = QWENRT_ELSEWHERE;
  CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), 2) == QWENRT_NOT_SERVED, "elsewhere");
  for (int kind : {-1, 6}) {
    linear.kind = kind;
    CHECK(qwenrt_linear(with, &linear, x.data(), y.data(), 2) == QWENRT_BAD_ARGUMENT, "kind %d", kind);
  }
  CHECK(qwenrt_size_of("QwenrtLinear") == sizeof(QwenrtLinear) && qwenrt_size_of("Qwenrt") == -1, "sizes");
}

void test_choices() {
  CHECK(!qwenrt_open("avx9", 2), "an unknown set was taken");
  use("auto");
  CHECK(strcmp(qwenrt_isa(with), qwenrt_isa_at(0)) == 0 && qwenrt_threads(with) == 2, "%s", qwenrt_isa(with));
  const QwenrtHandle* const other = qwenrt_open("scalar", 3);
  CHECK(qwenrt_open("auto", 2) == with && qwenrt_threads(other) == 3, "one for each set and number of threads");
  CHECK(strcmp(qwenrt_isa(with), qwenrt_isa_at(0)) == 0 && qwenrt_threads(with) == 2, "another changes nothing");
  CHECK(qwenrt_isa_at(-1) == nullptr && qwenrt_isa_at(99) == nullptr, "out of range");
}

}  // namespace

int main(int count, char** arguments) {
  const int shapes = count > 1 ? atoi(arguments[1]) : 60;
  use("auto");
  test_choices();
  test_refusals();
  test_shapes(shapes);
  test_extremes();
  test_what_is_not_finite();
  test_nothing();
  test_dense16(shapes);
  test_dense12(shapes);
  test_every_16_bit_value();
  printf("linears:");
  for (int i = 0; qwenrt_isa_at(i); ++i) printf(" %s", qwenrt_isa_at(i));
  printf(": ok\n");
  return 0;
}
