// The C ABI of what the choice of a token needs of a row of logits: passes over the vocabulary, on the caller's thread.
#pragma once
#include "abi/qwenrt_cpu.h"

// The largest of logits [count > 0] and where it is, the first of equal ones. Returns QWENRT_NOT_FINITE where any is
// infinite or NaN; `token` and `largest` are then those of what is not NaN, or 0 and -infinity.
QWENRT_API int qwenrt_argmax_finite(const float* logits, int64_t count, int64_t* token, float* largest);

// The k largest of logits [count], falling, equal ones by their place: ids [k], and values [k] = (logit - largest) /
// temperature, each of the two operations rounded. Where `logsumexp` is given: log(sum(exp((logit - largest) /
// temperature))) of all. Returns QWENRT_NOT_SERVED where fewer than k are not NaN.
QWENRT_API int qwenrt_topk(const QwenrtHandle* with, const float* logits, int64_t count, float largest,
                           float temperature, int64_t k, float* values, int64_t* ids, float* logsumexp);
