// A forward pass through decoder layers in one call against the ops it is made of, called one by one through the C ABI,
// with every instruction set that runs here: the same bits. Experts against plain loops over the same linears.
#include "abi/qwenrt_forward.h"
#include "check.h"

namespace {

constexpr int64_t kHidden = 40, kHeads = 4, kKvHeads = 2, kDim = 8, kInner = 24, kVocabulary = 37,
                  kVocabularyOfSlots = 64;

// A linear and all that it points at, on the heap so that a sanitizer sees a read past it.
struct Weight {
  std::vector<uint8_t> codes;
  std::vector<uint32_t> words;
  std::vector<uint16_t> halves;  // scales, or the whole weight
  std::vector<float> bias;
  QwenrtQuantMatrix matrix{};
  std::vector<uint8_t> chunks;
  std::vector<int32_t> first, inputs;
  QwenrtDense12 dense12{};
  std::vector<Weight> owned;
  std::vector<QwenrtLinear> parts;

  QwenrtLinear make(int64_t n, int64_t k, int bits, Random& random, int activations) {
    QwenrtLinear linear{};
    linear.out_features = n, linear.in_features = k, linear.activations = rounded(activations);
    bias = random.floats(n);
    if (bits == 12) {
      std::vector<uint16_t> w;
      for (int64_t i = 0; i < n * k; ++i) w.push_back(uint16_t((random.bits() & 0x80ff) | (58 + random.below(4)) << 8));
      chunks.resize(size_t(n * ((k + QWENRT_CHUNK - 1) / QWENRT_CHUNK) * QWENRT_CHUNK_BYTES)),
          first.resize(size_t(n + 1));
      dense12 = {chunks.data(), bias.data(), first.data(), nullptr, nullptr, n, k, 59};
      CHECK(qwenrt_dense12_pack(with, w.data(), &dense12) == QWENRT_OK, "pack");
      inputs.resize(size_t(first.back())), halves.resize(size_t(first.back()));
      dense12.inputs = inputs.data(), dense12.weights = halves.data();
      CHECK(qwenrt_dense12_pack_others(with, w.data(), &dense12) == QWENRT_OK, "pack others");
      linear.kind = QWENRT_DENSE12, linear.matrix = &dense12;
      return linear;
    }
    if (bits == 16) {
      for (int64_t i = 0; i < n * k; ++i) halves.push_back(uint16_t((random.bits() & 0x807f) | 0x3d80));  // bfloat16
      linear.kind = QWENRT_DENSE_BFLOAT16, linear.matrix = halves.data(), linear.bias = bias.data();
      return linear;
    }
    const int64_t group = 16, groups = (k + group - 1) / group, blocks = (n + QWENRT_BLOCK - 1) / QWENRT_BLOCK;
    for (int64_t i = 0; i < n * k; ++i) codes.push_back(uint8_t(random.below(int64_t(1) << bits)));
    matrix.words_per_group = (group * bits + 31) / 32;
    words.assign(size_t(blocks * groups * matrix.words_per_group * QWENRT_BLOCK), 0);
    CHECK(qwenrt_pack(with, codes.data(), words.data(), k, n, group, bits) == QWENRT_OK, "pack");
    for (int64_t i = 0; i < blocks * groups * QWENRT_BLOCK; ++i)
      halves.push_back(uint16_t((bits == 4 ? 0x2400 : 0x1400) | (random.bits() & 0x3ff)));  // 2^-6 or 2^-10
    matrix.words = words.data(), matrix.scales = halves.data(), matrix.bias = bias.data();
    matrix.out_features = n, matrix.in_features = k, matrix.groups = groups, matrix.group_size = group;
    matrix.bits = bits, matrix.zero = 1 << (bits - 1);
    linear.kind = QWENRT_QUANTIZED, linear.matrix = &matrix;
    return linear;
  }

  QwenrtLinear make_parts(std::initializer_list<int64_t> rows, int64_t k, Random& random, int activations) {
    QwenrtLinear linear{};
    owned.resize(rows.size());
    for (int64_t n : rows) {
      const size_t i = parts.size();
      parts.push_back(owned[i].make(n, k, i % 3 == 0 ? 4 : i % 3 == 1 ? 16 : 12, random, activations));
      linear.out_features += n;
    }
    linear.kind = QWENRT_PARTS;
    linear.in_features = k, linear.matrix = parts.data(), linear.part_count = int64_t(parts.size());
    return linear;
  }
};

std::vector<float> apply(const QwenrtLinear& w, const std::vector<float>& x, int64_t tokens) {
  std::vector<float> y(size_t(tokens * w.out_features), NAN);
  if (w.kind == QWENRT_PARTS) {
    const QwenrtLinear* const parts = static_cast<const QwenrtLinear*>(w.matrix);
    int64_t first = 0;
    for (int64_t i = 0; i < w.part_count; first += parts[i++].out_features) {
      const std::vector<float> part = apply(parts[i], x, tokens);
      const int64_t n = parts[i].out_features;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < n; ++j) y[size_t(t * w.out_features + first + j)] = part[size_t(t * n + j)];
    }
    return y;
  }
  CHECK(qwenrt_linear(with, &w, x.data(), y.data(), tokens) == QWENRT_OK, "a linear of %d rows", int(w.out_features));
  return y;
}

std::vector<float> mlp(const QwenrtLinear& up, const QwenrtLinear& down, const std::vector<float>& x, int64_t tokens) {
  const std::vector<float> gate_up = apply(up, x, tokens);
  std::vector<float> inner(size_t(tokens * up.out_features / 2));
  qwenrt_silu_and_mul(with, gate_up.data(), inner.data(), tokens, up.out_features / 2);
  return apply(down, inner, tokens);
}

// The sum of a token's experts, in double but for the experts themselves.
std::vector<double> experts(const QwenrtExperts& e, const std::vector<float>& x) {
  std::vector<double> weight, total(size_t(kHidden), 0.0);
  double most = -INFINITY, sum = 0, kept = 0;
  for (int64_t i = 0; i < e.count; ++i) {
    double score = 0;
    for (int64_t j = 0; j < kHidden; ++j) score += double(x[size_t(j)]) * e.router[i * kHidden + j];
    weight.push_back(score), most = fmax(most, score);
  }
  for (double& w : weight) sum += w = exp(w - most);
  std::vector<bool> chosen(weight.size(), false);
  for (int64_t rank = 0; rank < e.top_k; ++rank) {
    size_t best = weight.size();
    for (size_t i = 0; i < weight.size(); ++i)
      if (!chosen[i] && (best == weight.size() || weight[i] > weight[best])) best = i;
    chosen[best] = true, kept += weight[best];
  }
  const auto add = [&](int64_t expert, double by) {
    const std::vector<float> y = mlp(e.gate_up[expert], e.down[expert], x, 1);
    for (int64_t j = 0; j < kHidden; ++j) total[size_t(j)] += by * y[size_t(j)];
  };
  for (int64_t i = 0; i < e.count; ++i)
    if (chosen[size_t(i)]) add(i, weight[size_t(i)] / (e.norm_topk_prob ? kept : sum));
  if (e.shared_gate) {
    double gate = 0;
    for (int64_t j = 0; j < kHidden; ++j) gate += double(x[size_t(j)]) * e.shared_gate[j];
    add(e.count, 1 / (1 + exp(-gate)));
  }
  return total;
}

constexpr int64_t kTaps = 3, kChannels = 2 * 2 * kDim + kHeads * kDim;

// Three slots of linear attention.
struct States {
  std::vector<float> conv = std::vector<float>(3 * (kTaps - 1) * kChannels, NAN);
  std::vector<float> delta = std::vector<float>(3 * kHeads * kDim * kDim, NAN);
};

struct Model {
  Random random;
  std::vector<std::vector<float>> floats;
  std::vector<Weight> weights;  // never grows past what is reserved: linears point into it
  std::vector<QwenrtLinear> gate_up, down;
  QwenrtExperts mixture{};
  QwenrtDeltaLayer delta{};
  std::vector<QwenrtLayer> layers;
  QwenrtHead head{};
  int activations;

  const float* some(int64_t count, float size = 1) {
    floats.push_back(random.floats(count, size));
    return floats.back().data();
  }
  Weight& next() {
    CHECK(weights.size() < weights.capacity(), "room for weights");
    weights.emplace_back();
    return weights.back();
  }

  Model(uint64_t seed, int how, int64_t count, int64_t top_k, bool shared, bool norm) : random(seed), activations(how) {
    weights.reserve(80);
    floats.reserve(40);
    const int64_t qkv = (kHeads + 2 * kKvHeads) * kDim;
    for (int i = 0; i < 3; ++i) {
      QwenrtLayer l{};
      l.input_norm = some(kHidden), l.post_norm = some(kHidden), l.eps = 1e-6f, l.scale = 0.35f;
      if (i == 1) l.q_norm = some(kDim), l.k_norm = some(kDim), l.window = 3, l.gated = 1;
      l.num_heads = kHeads, l.num_kv_heads = kKvHeads, l.head_dim = kDim;
      l.qkv = i == 2 ? next().make_parts({kHeads * kDim, kKvHeads * kDim, kKvHeads * kDim}, kHidden, random, how)
                     : next().make(qkv + (l.gated ? kHeads * kDim : 0), kHidden, i ? 8 : 4, random, how);
      l.o = next().make(kHidden, kHeads * kDim, i ? 16 : 8, random, how);
      l.gate_up = next().make(2 * kInner, kHidden, i == 0 ? 4 : i == 1 ? 12 : 16, random, how);
      l.down = next().make(kHidden, kInner, i ? 4 : 8, random, how);
      layers.push_back(l);
    }
    for (int64_t i = 0; i < count + shared; ++i) {
      const int64_t inner = i == count ? 13 : 9;
      gate_up.push_back(i % 3 ? next().make(2 * inner, kHidden, i % 2 ? 4 : 8, random, how)
                              : next().make_parts({inner, inner}, kHidden, random, how));
      down.push_back(next().make(kHidden, inner, 4, random, how));
    }
    QwenrtDeltaNet& net = delta.net;
    net.key_heads = 2, net.value_heads = kHeads, net.key_dim = net.value_dim = kDim, net.taps = kTaps, net.eps = 1e-6f;
    net.conv = some(kTaps * kChannels), net.log_decay = some(kHeads), net.decay_bias = some(kHeads);
    net.out_norm = some(kDim), delta.rates = next().make(2 * kHeads, kHidden, 16, random, how);
    head.norm = some(kHidden), head.eps = 1e-5f;
    head.linear = next().make(kVocabulary, kHidden, count % 2 ? 8 : 16, random, how);
    mixture.router = some(count * kHidden, 0.2f), mixture.shared_gate = shared ? some(kHidden, 0.2f) : nullptr;
    mixture.gate_up = gate_up.data(), mixture.down = down.data();
    mixture.count = count, mixture.top_k = top_k, mixture.norm_topk_prob = norm;
  }
  // Makes the first layer one of linear attention, over these states.
  void use_delta(States& states) {
    if (!layers[0].delta) layers[0].qkv = next().make(kChannels + kHeads * kDim, kHidden, 4, random, activations);
    delta.net.conv_states = states.conv.data(), delta.net.delta_states = states.delta.data();
    layers[0].delta = &delta;
  }
};

// The cache of one layer, float32.
struct Kv {
  std::vector<float> k = std::vector<float>(kVocabularyOfSlots * kKvHeads * kDim, NAN), v = k;
  QwenrtCache cache() {
    QwenrtCache c{};
    c.k = k.data(), c.v = v.data(), c.block_size = 4, c.num_kv_heads = kKvHeads, c.head_dim = kDim;
    return c;
  }
};

// Two sequences that start: `tokens` and 2 of them.
struct Step {
  int64_t tokens;
  std::vector<int64_t> first, lens, tables{0, 8}, blocks, slots, logit_rows, state_slots{2, 0};
  std::vector<float> cos, sin;
  QwenrtSequences sequences{};
  QwenrtStep step{};
  Step(int64_t longer, Random& random)
      : tokens(longer + 2), first{0, longer}, lens{longer, 2}, logit_rows{longer - 1, longer + 1} {
    for (int64_t i = 0; i < 16; ++i) blocks.push_back(15 - i);
    for (int64_t s = 0; s < 2; ++s)
      for (int64_t p = 0; p < lens[size_t(s)]; ++p)
        slots.push_back(blocks[size_t(tables[size_t(s)] + p / 4)] * 4 + p % 4);
    cos = random.floats(tokens * kDim), sin = random.floats(tokens * kDim);
    sequences = {2, first.data(), lens.data(), lens.data(), tables.data(), blocks.data()};
    step = {&sequences, cos.data(), sin.data(),        nullptr, slots.data(),       kDim,
            tokens,     logit_rows.data(), 2, state_slots.data(), nullptr};
  }
};

void delta_by_ops(const QwenrtLayer& l, const Step& s, States& states, std::vector<float>& x) {
  std::vector<float> normed(x.size()), mixed(size_t(s.tokens * kChannels)), out(size_t(s.tokens * kHeads * kDim));
  qwenrt_rms_norm(with, x.data(), l.input_norm, normed.data(), s.tokens, kHidden, l.eps);
  const std::vector<float> projected = apply(l.qkv, normed, s.tokens), rates = apply(l.delta->rates, normed, s.tokens);
  QwenrtDeltaNet net = l.delta->net;
  net.projected = projected.data(), net.rates = rates.data(), net.slots = s.state_slots.data();
  net.mixed = mixed.data(), net.out = out.data();
  net.conv_states = states.conv.data(), net.delta_states = states.delta.data();
  CHECK(qwenrt_delta_net(with, &net, &s.sequences) == QWENRT_OK, "delta net");
  const std::vector<float> o = apply(l.o, out, s.tokens);
  for (size_t i = 0; i < x.size(); ++i) x[i] += o[i];
}

void attention_by_ops(const QwenrtLayer& l, const Step& s, Kv& kv, std::vector<float>& x) {
  const QwenrtCache cache = kv.cache();
  std::vector<float> normed(x.size()), qk(size_t(s.tokens * (kHeads + kKvHeads) * kDim)),
      out(size_t(s.tokens * kHeads * kDim));
  qwenrt_rms_norm(with, x.data(), l.input_norm, normed.data(), s.tokens, kHidden, l.eps);
  const std::vector<float> qkv = apply(l.qkv, normed, s.tokens);
  const QwenrtRotary rotary{qkv.data(),     qk.data(), l.q_norm, l.k_norm, s.cos.data(), s.sin.data(), nullptr,
                            s.slots.data(), kHeads,    kKvHeads, kDim,     kDim,         l.eps,        int32_t(l.gated)};
  CHECK(qwenrt_rotary_store(with, &rotary, &cache, s.tokens) == QWENRT_OK, "rotary");
  CHECK(qwenrt_attention(with, &s.sequences, &cache, qk.data(), (kHeads + kKvHeads) * kDim, kHeads, out.data(), l.scale,
                         l.window) == QWENRT_OK,
        "attention");
  if (l.gated)
    qwenrt_gate_output(with, out.data(), qkv.data() + kDim, l.qkv.out_features, 2 * kDim, out.data(), s.tokens, kHeads,
                       kDim);
  const std::vector<float> o = apply(l.o, out, s.tokens);
  for (size_t i = 0; i < x.size(); ++i) x[i] += o[i];
}

// The head's logits of the tokens that are asked for, from what the layers left.
void check_head(const QwenrtHead& head, const Step& s, const std::vector<float>& x, const std::vector<float>& logits) {
  std::vector<float> normed;
  for (int64_t token : s.logit_rows) {
    std::vector<float> row(size_t{kHidden});
    qwenrt_rms_norm(with, x.data() + token * kHidden, head.norm, row.data(), 1, kHidden, head.eps);
    normed.insert(normed.end(), row.begin(), row.end());
  }
  CHECK(apply(head.linear, normed, int64_t(s.logit_rows.size())) == logits, "%s: the head of %d tokens",
        qwenrt_isa(with), int(s.tokens));
}

void test_stack(int64_t longer, int activations, bool with_experts, bool with_delta) {
  Model m(uint64_t(longer) * 8 + uint64_t(activations), activations, 7, longer % 3 + 1, longer % 2 == 0,
          longer % 2 == 1);
  if (with_experts) m.layers[1].experts = &m.mixture, m.layers[1].gate_up = m.layers[1].down = QwenrtLinear{};
  Step s(longer, m.random);
  const std::vector<float> x = m.random.floats(s.tokens * kHidden);
  for (int isa = 0; qwenrt_isa_at(isa); ++isa) {
    use(qwenrt_isa_at(isa));
    std::vector<Kv> fused(3), single(3);
    States moved, moved_by_ops;
    if (with_delta) m.use_delta(moved);
    std::vector<QwenrtCache> caches;
    for (Kv& kv : fused) caches.push_back(kv.cache());
    std::vector<float> out = x, wanted = x, logits(2 * kVocabulary, NAN);
    CHECK(qwenrt_forward(with, m.layers.data(), caches.data(), 3, &m.head, &s.step, out.data(), logits.data()) ==
              QWENRT_OK,
          "stack");
    check_head(m.head, s, out, logits);
    for (size_t i = 0; i < 3; ++i) {
      const QwenrtLayer& l = m.layers[i];
      if (l.delta) delta_by_ops(l, s, moved_by_ops, wanted);
      else attention_by_ops(l, s, single[i], wanted);
      std::vector<float> normed(x.size());
      qwenrt_rms_norm(with, wanted.data(), l.post_norm, normed.data(), s.tokens, kHidden, l.eps);
      if (!l.experts) {
        const std::vector<float> y = mlp(l.gate_up, l.down, normed, s.tokens);
        for (size_t j = 0; j < y.size(); ++j) wanted[j] += y[j];
        continue;
      }
      for (int64_t t = 0; t < s.tokens; ++t) {
        const std::vector<double> y =
            experts(*l.experts, {normed.begin() + t * kHidden, normed.begin() + (t + 1) * kHidden});
        for (int64_t j = 0; j < kHidden; ++j) wanted[size_t(t * kHidden + j)] += float(y[size_t(j)]);
      }
    }
    double size = 0;
    for (float value : wanted) size = fmax(size, fabs(value));
    // Beside experts, what was rounded to integers may fall to the neighbour.
    const double allowed = !with_experts ? 0 : (activations == QWENRT_EXACT ? 1e-5 : 2e-2) * size;
    for (size_t i = 0; i < out.size(); ++i)
      CHECK(fabs(double(out[i]) - wanted[i]) <= allowed, "%s tokens=%d mode=%d experts=%d at %d: %.9g for %.9g",
            qwenrt_isa(with), int(s.tokens), activations, with_experts, int(i), out[i], wanted[i]);
    if (with_delta)
      CHECK(memcmp(moved.conv.data(), moved_by_ops.conv.data(), moved.conv.size() * sizeof(float)) == 0 &&
                memcmp(moved.delta.data(), moved_by_ops.delta.data(), moved.delta.size() * sizeof(float)) == 0,
            "%s: the states of %d tokens", qwenrt_isa(with), int(s.tokens));
  }
}

void test_refusals() {
  Model m(5, QWENRT_INT16, 7, 2, true, false);
  m.layers[1].experts = &m.mixture;
  Step s(3, m.random);
  std::vector<Kv> kv(3);
  std::vector<QwenrtCache> caches;
  for (Kv& one : kv) caches.push_back(one.cache());
  const std::vector<float> x = m.random.floats(s.tokens * kHidden);
  std::vector<float> out, logits(2 * kVocabulary);
  float bad = 0;
  const auto run = [&] {
    out = x, out[size_t(2 * kHidden + 1)] += bad;
    return qwenrt_forward(with, m.layers.data(), caches.data(), 3, &m.head, &s.step, out.data(), logits.data());
  };
  CHECK(run() == QWENRT_OK, "as it is");
  for (int64_t top_k : {0, 8}) {
    m.mixture.top_k = top_k;
    CHECK(run() == QWENRT_BAD_ARGUMENT, "top_k %d of 7", int(top_k));
  }
  m.mixture.top_k = 7;
  CHECK(run() == QWENRT_OK, "all experts");
  bad = NAN;
  CHECK(run() == QWENRT_NOT_FINITE, "NaN");
  s.step.instead = [](const QwenrtLinear* w, const float*, float* y, int64_t tokens) {
    for (int64_t i = 0; i < tokens * w->out_features; ++i) y[i] = 0;
    return int(w->out_features == kVocabulary ? QWENRT_NOT_SERVED : QWENRT_OK);
  };
  CHECK(run() == QWENRT_NOT_SERVED, "NaN, computed instead but in the head");
  s.logit_rows[0] = 1;
  CHECK(run() == QWENRT_OK, "NaN, computed instead, of a token without logits");
  s.step.instead = nullptr, bad = 0;
  CHECK(run() == QWENRT_OK, "finite again");
  States states;
  m.use_delta(states), s.step.state_slots = nullptr;
  CHECK(run() == QWENRT_BAD_ARGUMENT, "no slots of states");
  s.step.state_slots = s.state_slots.data();
  CHECK(run() == QWENRT_OK, "slots of states");
  s.step.logit_row_count = s.tokens + 1;
  CHECK(run() == QWENRT_BAD_ARGUMENT, "more logit rows than tokens");
  s.step.logit_row_count = 0;
  logits.assign(logits.size(), 7);
  CHECK(run() == QWENRT_OK && logits[0] == 7, "no logit rows");
  m.layers[0].experts = &m.mixture;
  s.step.tokens = 0;
  CHECK(run() == QWENRT_BAD_ARGUMENT, "no tokens");
}

}  // namespace

int main(int count, char** arguments) {
  use("auto");
  const int64_t most = count > 1 ? atoi(arguments[1]) : 6;
  for (int64_t longer = 1; longer <= most && longer < 30; longer += longer < 4 ? 1 : 5)
    for (int activations : {QWENRT_EXACT, QWENRT_INT16, QWENRT_INT8})
      for (int with : {0, 1, 2, 3}) test_stack(longer, activations, with & 1, with & 2);
  test_refusals();
  printf("forwards:");
  for (int i = 0; qwenrt_isa_at(i); ++i) printf(" %s", qwenrt_isa_at(i));
  printf(": ok\n");
  return 0;
}
