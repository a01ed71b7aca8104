// What a handle of the C ABI stands for: the kernels of one instruction set, and threads.
#pragma once
#include "isa/linear_kernels.h"
#include "isa/layer_kernels.h"
#include "isa/quantize_group.h"

struct InstructionSet {
  const char* name;
  bool (*runs)();  // on this CPU, under this operating system
  const Kernels* (*linears)();
  const LayerKernels* (*layers)();
  QuantizeGroup* quantize;
};

// Those of this build that this CPU runs, best first; ends with one whose name is NULL.
const InstructionSet* instruction_sets();

struct QwenrtHandle {
  const InstructionSet* set;
  int threads;  // that share a call, the caller included
};

inline const Kernels& linear_kernels(const QwenrtHandle& with) { return *with.set->linears(); }
inline const LayerKernels* layer_kernels(const QwenrtHandle& with) { return with.set->layers(); }
