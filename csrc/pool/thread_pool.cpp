#include "pool/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

// Long enough to bridge the Python between two ops of a token, short enough not to starve other threads; and then,
// while other threads come first, long enough for that between two tokens: waking up costs as much as an op.
constexpr auto kSpin = std::chrono::microseconds(200), kYield = std::chrono::microseconds(1000);

inline void pause_cpu() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#else
  std::this_thread::yield();
#endif
}

template <class Done>
bool spin_until(Done done) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause_cpu();
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited > kYield) return done();
    if (waited > kSpin) std::this_thread::yield();
  }
}

// The tasks of a round and the next one to take, in one word, so that a late worker can neither take a task twice nor
// mistake one round's tasks for another's.
constexpr int kIndexBits = 32;
constexpr int64_t next_of(uint64_t word) { return int64_t(word & 0xffffffffu); }
constexpr int64_t count_of(uint64_t word) { return int64_t(word >> kIndexBits); }

// Never destroyed: its threads may outlive every static object at exit.
struct Pool {
  std::recursive_mutex turn;  // held by the one caller that uses the pool
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<uint64_t> tasks{0};  // count << 32 | next
  std::atomic<int64_t> left{0};    // tasks not finished
  std::atomic<int> sleeping{0};
  std::atomic<int> wanted{1};  // threads of a round, the caller included; set by who holds `turn`
  int workers = 0;             // threads started
  // Set before `tasks` and left alone until the round's last task is finished.
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
};

Pool* pool = new Pool;

constexpr int kMostThreads = 1024;

thread_local bool in_task = false;  // then the pool is in use, by the caller that waits for this task

void take_tasks(Pool& p) {
  for (;;) {
    const uint64_t word = p.tasks.fetch_add(1);
    if (next_of(word) >= count_of(word)) {
      in_task = false;
      return;
    }
    in_task = true;
    p.task(p.context, next_of(word));  // this task is unfinished, so the round and its fields last until it is
    p.left.fetch_sub(1, std::memory_order_release);
  }
}

void work(Pool* p, int index) {
  const auto something_to_do = [&] {
    const uint64_t word = p->tasks.load();
    return next_of(word) < count_of(word) && index < p->wanted.load() - 1;
  };
  for (;;) {
    if (!spin_until(something_to_do)) {
      std::unique_lock<std::mutex> lock(p->sleep);
      p->sleeping.fetch_add(1);
      p->wake.wait(lock, something_to_do);
      p->sleeping.fetch_sub(1);
    }
    take_tasks(*p);
  }
}

void start_workers(Pool& p) {
  while (p.workers < p.wanted.load() - 1) {
    try {
      std::thread(work, &p, p.workers).detach();
    } catch (const std::system_error&) {
      p.wanted.store(p.workers + 1);  // the system gives no more threads: go on with these
      return;
    }
    ++p.workers;
  }
}

#if !defined(_WIN32)
// A fork waits for the call in progress, so that the child finds no scratch memory half changed. The child has none of
// the parent's workers: it begins anew with the same size.
void before_fork() {
  if (!in_task) pool->turn.lock();
}
void after_fork_in_parent() {
  if (!in_task) pool->turn.unlock();
}
void after_fork_in_child() {
  const int wanted = pool->wanted.load();
  pool = new Pool;
  pool->wanted.store(wanted);
}
const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
#endif

}  // namespace

PoolLock::PoolLock() {
  if (!in_task) pool->turn.lock();
}
PoolLock::PoolLock(int threads) : PoolLock() {
  const int wanted = threads < 1 ? 1 : (threads > kMostThreads ? kMostThreads : threads);
  if (!in_task && pool->wanted.load() != wanted) pool->wanted.store(wanted);  // waiting workers read it all the time
}
PoolLock::~PoolLock() {
  if (!in_task) pool->turn.unlock();
}

void parallel_for(int64_t count, void (*task)(void*, int64_t), void* context) {
  PoolLock turn;
  Pool& p = *pool;
  if (count > 1 && !in_task) start_workers(p);
  if (count <= 1 || in_task || p.wanted.load() < 2) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  p.task = task;
  p.context = context;
  p.left.store(count);
  p.tasks.store(uint64_t(count) << kIndexBits);
  if (p.sleeping.load() > 0) {
    { std::lock_guard<std::mutex> lock(p.sleep); }
    p.wake.notify_all();
  }
  take_tasks(p);
  // Only tasks that a worker has begun are waited for: one that never got a core delays nobody.
  const auto done = [&] { return p.left.load(std::memory_order_acquire) == 0; };
  while (!spin_until(done)) std::this_thread::yield();
}

int start_pool_threads(int threads) {
  PoolLock lock(threads);
  start_workers(*pool);
  return pool->wanted.load();
}

int pool_threads() { return pool->wanted.load(); }

constexpr int64_t kShares = 5;  // of each thread

int64_t Shares::begin(int64_t i) const {
  if (count != kShares * threads) return units * i / count;
  // Of 16 parts, 10 go to the first task of each thread, 4 to the next two of each and 2 to the last two.
  if (i <= threads) return units * 10 * i / (16 * threads);
  if (i <= 3 * threads) return units * (20 * threads + 4 * (i - threads)) / (32 * threads);
  return units * (28 * threads + 2 * (i - 3 * threads)) / (32 * threads);
}

Shares shares_of(int64_t units, int64_t work) {
  constexpr int64_t kSmallWork = 64 * 1024, kSmallShare = 2;
  const int64_t threads = pool_threads(), few = units / 4 > 0 ? units / 4 : 1;
  if (threads == 1 || work < kSmallWork) return {units, threads, 1};
  if (units / (16 * threads) < kSmallShare) return {units, threads, few < threads ? few : threads};
  return {units, threads, kShares * threads};
}
