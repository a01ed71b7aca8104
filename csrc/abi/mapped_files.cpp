// A mapped file that is cut while it is used answers a read past its new end with SIGBUS, which ends the process.
// Within the mappings that are guarded here such a read gets zeros instead, and a mark that the engine looks at after
// each step, before anything of it is given out. Nothing is paid as long as nothing faults.
#include "abi/qwenrt_cpu.h"

#if defined(_WIN32)  // a file cannot be cut there while it is mapped

QWENRT_API int qwenrt_guard_mapping(const void*, int64_t) { return -1; }
QWENRT_API void qwenrt_unguard_mapping(int) {}
QWENRT_API int64_t qwenrt_lost_mappings(void) { return 0; }
QWENRT_API int qwenrt_mapping_lost(int) { return 0; }

#else

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace {

struct Mapping {
  std::atomic<uintptr_t> begin{0}, end{0};  // end 0: a free place
  std::atomic<int> lost{0};
};

constexpr int kPlaces = 16384;
Mapping places[kPlaces];
std::atomic<int64_t> lost_mappings{0};
std::atomic<int> places_used{0};  // none beyond was ever taken
struct sigaction before;          // who handled SIGBUS when we came
std::mutex lock;
uintptr_t page_size;

void on_bus_error(int signal, siginfo_t* info, void*) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  const int used = places_used.load();
  for (int i = 0; info->si_code == BUS_ADRERR && i < used; ++i) {
    const uintptr_t end = places[i].end.load();
    if (at < places[i].begin.load() || at >= end) continue;
    // All that follows is gone as well: one mapping instead of a fault for each of its pages.
    const uintptr_t page = at / page_size * page_size;
    const uintptr_t last = (end + page_size - 1) / page_size * page_size;
    void* zeros = mmap(reinterpret_cast<void*>(page), last - page, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    if (zeros == MAP_FAILED) break;
    places[i].lost.store(1);
    lost_mappings.fetch_add(1);
    return;
  }
  sigaction(signal, &before, nullptr);  // not ours: the same access faults again and finds whoever was here before
}

// Again with each mapping: another library may have taken the signal for itself since.
bool install() {
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) != 0) return false;
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_bus_error) return true;
  before = now;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGBUS, &ours, nullptr) == 0;
}

}  // namespace

// A place for the mapping, to be given back before the memory is another's; -1 where it cannot be guarded.
QWENRT_API int qwenrt_guard_mapping(const void* begin, int64_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (begin == nullptr || bytes <= 0 || !install()) return -1;
  for (int i = 0; i < kPlaces; ++i) {
    if (places[i].end.load() != 0) continue;
    places[i].lost.store(0);
    places[i].begin.store(reinterpret_cast<uintptr_t>(begin));
    places[i].end.store(reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes));
    if (i >= places_used.load()) places_used.store(i + 1);
    return i;
  }
  return -1;
}

QWENRT_API void qwenrt_unguard_mapping(int place) {
  std::lock_guard<std::mutex> hold(lock);
  if (place >= 0 && place < kPlaces) places[place].end.store(0);
}

// How many faults were answered with zeros since the library was loaded.
QWENRT_API int64_t qwenrt_lost_mappings(void) { return lost_mappings.load(); }

QWENRT_API int qwenrt_mapping_lost(int place) {
  return place >= 0 && place < kPlaces ? places[place].lost.load() : 0;
}

#endif
