// A small pool of our own, so that waiting threads spin no longer than we say and do not fight torch's.
#pragma once
#include <cstdint>

// Runs task(context, i) for every i in [0, count), shared between the caller and the pool's workers. One call at a
// time: callers on other threads wait for their turn; a task that calls it runs its own tasks alone. In a forked child
// the workers are started anew.
void parallel_for(int64_t count, void (*task)(void* context, int64_t i), void* context);

// Holds the pool for a caller that runs several parallel_for over shared scratch memory, and says with how many
// threads.
class PoolLock {
 public:
  explicit PoolLock(int threads);
  PoolLock();  // as many as the last one
  ~PoolLock();
  PoolLock(const PoolLock&) = delete;
  PoolLock& operator=(const PoolLock&) = delete;
};

// Starts what so many threads need, the caller included. Returns how many there are: fewer where the system starts no
// more.
int start_pool_threads(int threads);
// Of the caller that holds the pool.
int pool_threads();

constexpr int64_t kTasksPerThread = 4;  // so that a thread that is held up leaves its share to the others

// How tasks share `units` of work: task i has [begin(i), begin(i + 1)). Each thread finds a large share, which it goes
// through in one go, then ever smaller ones: the threads end together although none is as fast as another for long.
struct Shares {
  int64_t units, threads, count;
  int64_t begin(int64_t i) const;
};

// For so many multiply-adds of `work`: a single task where waking the workers costs more than it saves.
Shares shares_of(int64_t units, int64_t work);
