// The instruction sets of this build, which of them this CPU runs, and which serves. Built without special flags: no
// unit of a set is entered before the CPU was asked. QWENRT_WITH_... says which units the build has.
#include "dispatch.h"

#include <string.h>

#include <atomic>

#ifdef QWENRT_X86
#include <cpuid.h>
#endif

namespace {

bool always() { return true; }

#ifdef QWENRT_X86
// __builtin_cpu_supports asks the operating system as well: it must save the registers.
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

struct Found {
  InstructionSet sets[5] = {};
  int count = 0;
  void add(const InstructionSet& set) {
    if (set.runs()) sets[count++] = set;
  }
  Found() {
#ifdef QWENRT_X86
    add({"avx2", has_avx2, avx2_kernels, avx2_layer_kernels});
#endif
    add({"scalar", always, scalar_kernels, scalar_layer_kernels});
  }
};

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{instruction_sets()};
  return set;
}

}  // namespace

const InstructionSet* instruction_sets() {
  static const Found found;
  return found.sets;
}

const InstructionSet& chosen_set() { return *chosen().load(); }

const LayerKernels* layer_kernels() { return chosen_set().layers(); }

const char* qwenrt_isa(void) { return chosen_set().name; }

int qwenrt_set_isa(const char* name) {
  const bool best = strcmp(name, "auto") == 0;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (best || strcmp(name, set->name) == 0) {
      chosen() = set;
      return 0;
    }
  return -1;
}

const char* qwenrt_isa_at(int index) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (index-- == 0) return set->name;
  return nullptr;
}
