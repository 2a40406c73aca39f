#include "thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <chrono>
#include <climits>
#include <mutex>
#include <thread>
#include <vector>

namespace apt {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kPausesPerLook = 16;  // between two looks at the clock
constexpr uint32_t kClosed = UINT32_MAX;

thread_local bool is_inside_task = false;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or until the spin time is over; returns done().
template <typename Done>
bool spin_until(Done done) {
  const auto deadline = Clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (done()) return true;
      pause_briefly();
    }
  } while (Clock::now() < deadline);
  return done();
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t while_equal) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, while_equal, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

int usable_cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int num_threads) {
    const int num_workers = std::max(num_threads, 1) - 1;
    for (int i = 0; i < num_workers; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    is_stopping_ = true;
    ++job_;
    futex_wake(job_, INT_MAX);
    for (auto& worker : workers_) worker.join();
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // One caller at a time.
  void run(int64_t num_tasks, void (*fn)(void*, int64_t), void* context) {
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    // A worker that is late for the job before must not mistake the new job's fields for the old one's: its claim fails
    // as soon as the job number in cursor_ changes.
    cursor_.store(pack(job, kClosed));
    fn_.store(fn, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    num_tasks_.store(static_cast<uint32_t>(num_tasks), std::memory_order_release);
    num_left_.store(static_cast<uint32_t>(num_tasks), std::memory_order_relaxed);
    cursor_.store(pack(job, 0));
    job_.store(job);
    if (num_sleeping_.load() > 0) futex_wake(job_, static_cast<int>(std::min<int64_t>(num_tasks - 1, INT_MAX)));
    take_tasks();
    wait_for_others();
  }

 private:
  static uint64_t pack(uint32_t job, uint32_t task) { return static_cast<uint64_t>(job) << 32 | task; }

  void work() {
    is_inside_task = true;
    uint32_t seen = 0;
    while (!is_stopping_) {
      const auto has_new_job = [&] { return job_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(has_new_job)) {
        ++num_sleeping_;
        futex_wait(job_, seen);
        --num_sleeping_;
      }
      seen = job_.load();
      take_tasks();
    }
  }

  // Takes tasks of the current job until none is left. The job cannot end, nor its fields change, between a claim and
  // the report that the task is done.
  void take_tasks() {
    uint32_t num_done = 0;
    uint64_t cursor = cursor_.load();
    for (;;) {
      const auto fn = fn_.load(std::memory_order_acquire);
      const auto context = context_.load(std::memory_order_acquire);
      const uint32_t num_tasks = num_tasks_.load(std::memory_order_acquire);
      const uint32_t task = static_cast<uint32_t>(cursor);
      if (task == kClosed || task >= num_tasks) break;
      if (!cursor_.compare_exchange_weak(cursor, cursor + 1)) continue;
      fn(context, task);
      ++num_done;
      cursor = cursor_.load();
    }
    if (num_done == 0 || num_left_.fetch_sub(num_done) != num_done) return;
    if (is_caller_asleep_.load()) futex_wake(num_left_, 1);
  }

  void wait_for_others() {
    if (spin_until([&] { return num_left_.load(std::memory_order_acquire) == 0; })) return;
    is_caller_asleep_ = true;
    while (const uint32_t left = num_left_.load()) futex_wait(num_left_, left);
    is_caller_asleep_ = false;
  }

  // Each on a cache line of its own: workers poll one while others are written.
  alignas(64) std::atomic<uint64_t> cursor_{0};  // job number << 32 | next task
  alignas(64) std::atomic<uint32_t> num_left_{0};
  alignas(64) std::atomic<uint32_t> job_{0};
  std::atomic<int> num_sleeping_{0};
  alignas(64) std::atomic<void (*)(void*, int64_t)> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> num_tasks_{0};
  std::atomic<bool> is_caller_asleep_{false};
  std::atomic<bool> is_stopping_{false};
  std::vector<std::thread> workers_;
};

struct Shared {
  std::mutex mutex;  // held while a job runs
  Pool* pool = nullptr;
  std::atomic<int> num_threads{usable_cores()};
};

Shared* shared = nullptr;  // never freed: workers may outlive static destructors
std::once_flag shared_once;

// A child process has no workers, and another thread of the parent may have held the mutex: it starts afresh.
void forget_after_fork() {
  auto* fresh = new Shared;
  fresh->num_threads = shared->num_threads.load();
  shared = fresh;
}

Shared& get_shared() {
  std::call_once(shared_once, [] {
    shared = new Shared;
    pthread_atfork(nullptr, nullptr, forget_after_fork);
  });
  return *shared;
}

}  // namespace

int num_threads() { return get_shared().num_threads.load(std::memory_order_relaxed); }

void set_num_threads(int count) {
  Shared& state = get_shared();
  const std::lock_guard lock(state.mutex);
  state.num_threads = std::max(count, 1);
  delete state.pool;
  state.pool = nullptr;
}

void run_tasks(int64_t num_tasks, void (*fn)(void* context, int64_t task), void* context) {
  assert(num_tasks < kClosed);
  if (num_tasks <= 1 || is_inside_task || num_threads() == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) fn(context, task);
    return;
  }
  Shared& state = get_shared();
  const std::lock_guard lock(state.mutex);
  if (state.pool == nullptr) state.pool = new Pool(state.num_threads);
  is_inside_task = true;
  state.pool->run(num_tasks, fn, context);
  is_inside_task = false;
}

}  // namespace apt
