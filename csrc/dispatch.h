// Which instruction set's kernels serve: asked by the C ABI at each call.
#pragma once
#include "kernels.h"
#include "layer_kernels.h"
#include "quantize.h"

struct InstructionSet {
  const char* name;
  bool (*runs)();  // on this CPU, under this operating system
  const Kernels* (*linears)();
  const LayerKernels* (*layers)();
  QuantizeGroup* quantize;
};

// Those of this build that this CPU runs, best first; ends with one whose name is NULL.
const InstructionSet* instruction_sets();
const InstructionSet& chosen_set();

inline const Kernels& linear_kernels() { return *chosen_set().linears(); }
