// What adapters add to the linears of a step. For callers that hold a PoolLock.
#pragma once
#include "abi/qwenrt_forward.h"

// y [tokens][outputs], what the linear w gave of x, with what those of `loras` add that are for w; they are sorted by
// their matrix.
int add_loras(const QwenrtHandle* with, const QwenrtLora* loras, int64_t count, const QwenrtLinear& w, const float* x,
              float* y, int64_t tokens);
