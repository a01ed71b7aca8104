// What a caller asks a library before it uses it: whether both speak of the same functions and structs.
#include <string.h>

#include "abi/qwenrt_forward.h"
#include "abi/qwenrt_layer.h"

int qwenrt_abi(void) { return QWENRT_ABI; }

int64_t qwenrt_size_of(const char* name) {
#define QWENRT_STRUCT(type) {#type, sizeof(type)}
  static constexpr struct {
    const char* name;
    size_t bytes;
  } structs[] = {
      QWENRT_STRUCT(QwenrtActivations), QWENRT_STRUCT(QwenrtQuantMatrix), QWENRT_STRUCT(QwenrtDense12),
      QWENRT_STRUCT(QwenrtLinear),      QWENRT_STRUCT(QwenrtRounding),    QWENRT_STRUCT(QwenrtSequences),
      QWENRT_STRUCT(QwenrtCache),       QWENRT_STRUCT(QwenrtRotary),      QWENRT_STRUCT(QwenrtExperts),
      QWENRT_STRUCT(QwenrtLayer),       QWENRT_STRUCT(QwenrtStep),        QWENRT_STRUCT(QwenrtHead),
      QWENRT_STRUCT(QwenrtDeltaNet),    QWENRT_STRUCT(QwenrtDeltaLayer),  QWENRT_STRUCT(QwenrtLora),
  };
#undef QWENRT_STRUCT
  for (const auto& one : structs)
    if (strcmp(one.name, name) == 0) return int64_t(one.bytes);
  return -1;
}
