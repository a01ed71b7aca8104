// The instruction sets of this build, which of them this CPU runs, and which serves. Built without special flags: no
// unit of a set is entered before the CPU was asked. QWENRT_WITH_... says which units the build has.
#include "abi/dispatch.h"

#include <string.h>

#include <forward_list>

#include "pool/thread_pool.h"

#ifdef QWENRT_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
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

bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef QWENRT_WITH_AMX
// The system keeps the tiles' registers only for processes that ask it to; Linux alone is asked here.
bool has_amx() {
#if defined(QWENRT_EMULATED_AMX)
  return has_avx512vnni();
#elif defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBfloat = 1u << 22, kAll = kTiles | kInt8 | kBfloat;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef QWENRT_WITH_NEONDOT
bool has_dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1UL << 20);  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

struct Found {
  InstructionSet sets[6] = {};
  int count = 0;
  void add(const InstructionSet& set) {
    if (set.runs()) sets[count++] = set;
  }
  Found() {
#ifdef QWENRT_WITH_AMX
    add({"amx", has_amx, amx_kernels, avx512_layer_kernels, avx2_quantize_group});
#endif
#ifdef QWENRT_WITH_AVX512
    add({"avx512vnni", has_avx512vnni, avx512vnni_kernels, avx512_layer_kernels, avx2_quantize_group});
#endif
#ifdef QWENRT_WITH_AVX2
    add({"avx2", has_avx2, avx2_kernels, avx2_layer_kernels, avx2_quantize_group});
#endif
#ifdef QWENRT_WITH_NEONDOT
    add({"neondot", has_dot_products, neondot_kernels, neon_layer_kernels, neon_quantize_group});
#endif
#ifdef QWENRT_WITH_NEON
    add({"neon", always, neon_kernels, neon_layer_kernels, neon_quantize_group});  // part of every ARMv8
#endif
    add({"scalar", always, scalar_kernels, scalar_layer_kernels, scalar_quantize_group});
  }
};

// One for each set and number of threads that was ever asked for; under PoolLock.
std::forward_list<QwenrtHandle> opened;

}  // namespace

const InstructionSet* instruction_sets() {
  static const Found found;
  return found.sets;
}

const QwenrtHandle* qwenrt_open(const char* name, int threads) {
  const bool best = strcmp(name, "auto") == 0;
  const InstructionSet* set = instruction_sets();
  while (set->name && !best && strcmp(name, set->name) != 0) ++set;
  if (!set->name) return nullptr;
  const PoolLock lock;
  const int here = start_pool_threads(threads);
  for (const QwenrtHandle& handle : opened)
    if (handle.set == set && handle.threads == here) return &handle;
  opened.push_front({set, here});
  return &opened.front();
}

const char* qwenrt_isa(const QwenrtHandle* with) { return with->set->name; }

int qwenrt_threads(const QwenrtHandle* with) { return with->threads; }

const char* qwenrt_isa_at(int index) {
  for (const InstructionSet* set = instruction_sets(); set->name; ++set)
    if (index-- == 0) return set->name;
  return nullptr;
}
