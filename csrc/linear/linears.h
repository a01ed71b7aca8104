// The linears of each kind, as qwenrt_linear: for callers that hold a PoolLock, and at least one token.
#pragma once
#include "isa/linear_kernels.h"

int quantized_linear(const Kernels& kernels, const QwenrtQuantMatrix& w, const QwenrtActivations& how, const float* x,
                     float* y, int64_t tokens);
// quantized_linear with rounded activations, int8 where they and 4-bit codes allow it, of kIntegerTokens tokens at
// most.
int integer_linear_chunk(const Kernels& kernels, const QwenrtQuantMatrix& w, const QwenrtActivations& how,
                         const float* x, float* y, int64_t tokens);
// `rounded` as of QwenrtLinear's activations.
int dense16_linear(const Kernels& kernels, DenseProduct product, bool rounded);
int dense12_linear(const Kernels& kernels, const QwenrtDense12& w, const float* x, float* y, int64_t tokens,
                   bool rounded);
