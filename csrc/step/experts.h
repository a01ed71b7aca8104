// What the units of a decoder layer share: one linear of whatever kind, and a mixture of experts.
#pragma once
#include "abi/qwenrt_decoder.h"

// x [tokens][in_features] -> y [tokens][out_features]. `part` has room for one part's y of so many tokens; a lone token
// needs none.
int run_linear(const QwenrtHandle* with, const QwenrtLinear& w, const float* x, float* y, int64_t tokens, float* part);

// Memory of a gated MLP for a step's tokens, of the widest.
struct MlpBuffers {
  float* gate_up;  // [tokens][2 intermediate]
  float* inner;    // [tokens][intermediate]
  float* part;     // as of run_linear
};

// x [tokens][hidden] -> y, likewise: down(silu(gate) * up).
int run_mlp(const QwenrtHandle* with, const QwenrtLinear& gate_up, const QwenrtLinear& down, const float* x, float* y,
            int64_t tokens, const MlpBuffers& b);

// out [tokens][hidden] += each token's experts over normed; y [tokens][hidden] is scratch. Under PoolLock.
int add_experts(const QwenrtHandle* with, const QwenrtExperts& e, const float* normed, float* y, float* out,
                int64_t tokens, int64_t hidden, const MlpBuffers& b);
