// What the units of a decoder layer share: a gated MLP, and a mixture of experts. For callers that hold a PoolLock.
#pragma once
#include "abi/qwenrt_forward.h"
#include "step/lora.h"

// The linears of a step: those that are elsewhere, and whose inputs the kernels refuse, are left to `instead`, where
// there is one; then come the adapters.
struct Linears {
  const QwenrtHandle* with;
  QwenrtInstead instead;
  const QwenrtLora* loras;
  int64_t lora_count;

  int operator()(const QwenrtLinear& w, const float* x, float* y, int64_t tokens) const {
    int status = qwenrt_linear(with, &w, x, y, tokens);
    const bool left = status == QWENRT_NOT_FINITE || status == QWENRT_NOT_SERVED;
    if (left && instead) status = instead(&w, x, y, tokens);
    return status || !lora_count ? status : add_loras(with, loras, lora_count, w, x, y, tokens);
  }
};

// Memory of a gated MLP for a step's tokens, of the widest.
struct MlpBuffers {
  float* gate_up;  // [tokens][2 intermediate]
  float* inner;    // [tokens][intermediate]
};

// x [tokens][hidden] -> y, likewise: down(silu(gate) * up).
int run_mlp(const Linears& linear, const QwenrtLinear& gate_up, const QwenrtLinear& down, const float* x, float* y,
            int64_t tokens, const MlpBuffers& b);

// out [tokens][hidden] += each token's experts over normed; y [tokens][hidden] is scratch.
int add_experts(const Linears& linear, const QwenrtExperts& e, const float* normed, float* y, float* out,
                int64_t tokens, int64_t hidden, const MlpBuffers& mlp);
