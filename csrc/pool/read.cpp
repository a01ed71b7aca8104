// Reading memory with all threads: what it can deliver at best.
#include <atomic>

#include "abi/dispatch.h"
#include "pool/thread_pool.h"

namespace {

struct ReadTask {
  const uint64_t* memory;
  int64_t words, tasks;
  std::atomic<uint64_t> sum;
};

// Two distant streams a task: one alone does not keep enough lines in flight to saturate the memory.
void run_read_task(void* context, int64_t i) {
  ReadTask& t = *static_cast<ReadTask*>(context);
  const int64_t first = t.words * i / t.tasks, last = t.words * (i + 1) / t.tasks, half = (last - first) / 2;
  const uint64_t *a = t.memory + first, *b = a + half;
  uint64_t sums[8] = {};
  int64_t j = 0;
  for (; j + 4 <= half; j += 4)
    for (int k = 0; k < 4; ++k) {
      sums[k] += a[j + k];
      sums[4 + k] += b[j + k];
    }
  for (; j < half; ++j) sums[0] += a[j] + b[j];
  for (const uint64_t* rest = b + half; rest < t.memory + last; ++rest) sums[0] += *rest;
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  t.sum += sum;
}

}  // namespace

uint64_t qwenrt_read(const QwenrtHandle* with, const uint64_t* memory, int64_t words) {
  PoolLock lock(with->threads);
  ReadTask task{memory, words, pool_threads() * kTasksPerThread, {0}};
  parallel_for(task.tasks, run_read_task, &task);
  return task.sum;
}
