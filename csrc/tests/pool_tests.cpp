// The thread pool: every task once, whoever calls, with any number of threads, nested, after fork.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "pool/thread_pool.h"
#include "check.h"

namespace {

struct Counts {
  std::vector<std::atomic<int>> of;
  explicit Counts(int64_t tasks) : of(static_cast<size_t>(tasks)) {}
  static void add(void* counts, int64_t i) { static_cast<Counts*>(counts)->of[size_t(i)].fetch_add(1); }
  void expect(int each, const char* what) {
    for (size_t i = 0; i < of.size(); ++i)
      CHECK(of[i] == each, "%s: task %d ran %d times, not %d", what, int(i), of[i].load(), each);
  }
};

// Not atomic: only the pool orders the tasks' writes before the caller's reads.
struct Plain {
  std::vector<int64_t> values;
  static void square(void* plain, int64_t i) { static_cast<Plain*>(plain)->values[size_t(i)] = i * i; }
  void run(int64_t tasks) {
    values.assign(size_t(tasks), -1);
    parallel_for(tasks, square, this);
    for (int64_t i = 0; i < tasks; ++i) CHECK(values[size_t(i)] == i * i, "task %d of %d", int(i), int(tasks));
  }
};

void test_every_size(int rounds) {
  const int cores = int(std::thread::hardware_concurrency());
  for (int threads : {1, 2, 3, cores + 6, 1, 2}) {
    CHECK(start_pool_threads(threads) == threads, "%d threads were asked for", threads);
    CHECK(pool_threads() == threads, "%d", pool_threads());
    Plain plain;
    for (int64_t tasks : {0, 1, 2, 3, 7, 64, 1000}) plain.run(tasks);
    for (int i = 0; i < rounds; ++i) plain.run(1 + i % 9);
  }
  CHECK(start_pool_threads(0) == 1 && start_pool_threads(-5) == 1, "no threads at all");
}

void test_many_callers(int rounds) {
  start_pool_threads(3);
  std::vector<std::thread> callers;
  for (int c = 0; c < 32; ++c)
    callers.emplace_back([rounds] {
      Plain plain;
      for (int i = 0; i < rounds; ++i) plain.run(1 + i % 13);
    });
  for (std::thread& caller : callers) caller.join();
}

void test_the_size_changes_under_callers(int rounds) {
  std::atomic<bool> done{false};
  std::thread changing([&] {
    for (int i = 0; !done; ++i) start_pool_threads(1 + i % 5);
  });
  Plain plain;
  for (int i = 0; i < rounds; ++i) plain.run(1 + i % 13);
  done = true;
  changing.join();
}

// PoolLock keeps other callers out between two calls: what the first wrote is there for the second.
void test_a_lock_spans_calls(int rounds) {
  start_pool_threads(3);
  static int64_t shared[64];
  std::vector<std::thread> callers;
  for (int c = 0; c < 8; ++c)
    callers.emplace_back([rounds, c] {
      for (int i = 0; i < rounds; ++i) {
        PoolLock lock(1 + c % 4);
        CHECK(pool_threads() == 1 + c % 4, "%d threads in a turn of %d", pool_threads(), 1 + c % 4);
        int64_t mine = c;
        parallel_for(64, [](void* value, int64_t t) { shared[t] = *static_cast<int64_t*>(value); }, &mine);
        parallel_for(
            64, [](void* value, int64_t t) { CHECK(shared[t] == *static_cast<int64_t*>(value), "overwritten"); },
            &mine);
      }
    });
  for (std::thread& caller : callers) caller.join();
}

// A task that calls parallel_for itself finds the pool in use and does all of it alone.
void test_nested_calls() {
  for (int threads : {1, 3}) {
    start_pool_threads(threads);
    Counts inner(8 * 5);
    struct Outer {
      Counts* counts;
      std::atomic<int> round;
    } outer{&inner, {0}};
    for (int round = 0; round < 50; ++round)
      parallel_for(
          8, [](void* context, int64_t) { parallel_for(8 * 5, Counts::add, static_cast<Outer*>(context)->counts); },
          &outer);
    inner.expect(8 * 50, "nested");
  }
}

// Workers wake from sleep, and finish rounds whose caller slept meanwhile.
void test_rounds_after_sleep() {
  start_pool_threads(3);
  Plain plain;
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // longer than they spin
    plain.run(50);
  }
  parallel_for(
      6,
      [](void*, int64_t i) {
        if (i % 2) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      },
      nullptr);
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork of several threads
int exit_of(pid_t child) {
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, "waitpid");
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

// The child has its own workers; the parent's go on. Also where another thread was inside the pool at that time.
void test_fork() {
  start_pool_threads(3);
  std::atomic<bool> done{false};
  std::thread busy([&] {
    Plain plain;
    while (!done) plain.run(20);
  });
  for (int i = 0; i < 10; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(200);
      Plain plain;
      for (int round = 0; round < 20; ++round) plain.run(40);
      const pid_t grandchild = fork();
      if (grandchild == 0) {
        alarm(200);
        plain.run(40);
        _exit(pool_threads() == 3 ? 0 : 2);
      }
      _exit(exit_of(grandchild));
    }
    const int status = exit_of(child);
    CHECK(status == 0, "the child ended with %d", status);
    Plain().run(40);
  }
  done = true;
  busy.join();
}
#endif

#ifdef __linux__
// Threads of this process that run or are ready to, the caller's aside.
int awake() {
  int count = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::ifstream file(task.path() / "stat");
    std::string line;
    std::getline(file, line);
    count += line.find(") R") != std::string::npos;
  }
  return count - 1;
}

// Waiting workers use the processor no longer than they spin: in the end all of them sleep.
void test_idle_workers_sleep() {
  start_pool_threads(4);
  Plain().run(100);
  while (awake() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}
#endif

void test_shares() {
  for (int threads : {1, 2, 3, 4, 7})
    for (int64_t units : {0, 1, 2, 7, 64, 100, 1376, 100003})
      for (int64_t work : {int64_t(100), int64_t(1) << 30}) {
        start_pool_threads(threads);
        const Shares shares = shares_of(units, work);
        CHECK(shares.count >= 1 && shares.begin(0) == 0 && shares.begin(shares.count) == units, "%d of %d threads",
              int(units), threads);
        for (int64_t i = 0; i < shares.count; ++i)
          CHECK(shares.begin(i) <= shares.begin(i + 1), "share %d of %d", int(i), int(shares.count));
        CHECK(units < 1000 || shares.count == 1 || 4 * (units - shares.begin(shares.count - 1)) < shares.begin(1),
              "the last of %d shares is not small", int(shares.count));
        CHECK(shares.count == 1 || (threads > 1 && work > 100), "little work is shared");
        CHECK(shares.count > 1 || threads == 1 || work == 100 || units < 8, "%d units are not shared", int(units));
      }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? atoi(arguments[1]) : 300;
  test_every_size(rounds);
  test_many_callers(rounds / 10);
  test_the_size_changes_under_callers(rounds);
  test_a_lock_spans_calls(rounds / 10);
  test_nested_calls();
  test_rounds_after_sleep();
#ifdef __linux__
  test_idle_workers_sleep();
#endif
  test_shares();
#if !defined(__SANITIZE_THREAD__)
  test_fork();
#endif
  printf("pool: ok\n");
  return 0;
}
