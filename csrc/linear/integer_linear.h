// Linears whose activations are rounded to int16 or int8 first.
#pragma once
#include "isa/linear_kernels.h"

// As qwenrt_quant_linear with rounded activations, int8 where they and 4-bit codes allow it, for at most
// kIntegerTokens tokens and a caller that holds a PoolLock.
int integer_linear_chunk(const QwenrtQuantMatrix& w, const float* x, float* y, int64_t tokens,
                         const QwenrtActivations& how, const Kernels& kernels);
