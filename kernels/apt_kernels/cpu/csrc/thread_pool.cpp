#include "thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
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

// Which chunks of a thread's share nobody has taken yet, as one word that can be claimed from at either end: job number,
// first chunk, end. A word with chunks left never comes back, so a late thread's claim on an old job fails.
struct Remaining {
  uint32_t job;
  uint16_t first, end;

  static Remaining from(uint64_t word) {
    return {static_cast<uint32_t>(word >> 32), static_cast<uint16_t>(word >> 16), static_cast<uint16_t>(word)};
  }
  uint64_t word() const { return uint64_t{job} << 32 | uint32_t{first} << 16 | end; }
  bool is_empty() const { return first == end; }
};

constexpr int64_t kMaxChunks = UINT16_MAX;

// What a thread is to do, in one cache line: the owner polls it, and whoever has finished his own helps.
struct alignas(64) Share {
  std::atomic<uint64_t> remaining{0};
  std::atomic<void (*)(void*, int64_t)> fn{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int64_t> num_tasks{0}, chunk_size{1};
};

class Pool {
 public:
  explicit Pool(int num_threads) : shares_(static_cast<size_t>(std::max(num_threads, 1))) {
    for (size_t i = 1; i < shares_.size(); ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    is_stopping_ = true;
    ++job_;
    futex_wake(job_, INT_MAX);
    for (auto& worker : workers_) worker.join();
  }

  // One caller at a time.
  void run(int64_t num_tasks, void (*fn)(void*, int64_t), void* context) {
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    const auto num_threads = static_cast<int64_t>(shares_.size());
    const int64_t chunk_size = (num_tasks + kMaxChunks - 1) / kMaxChunks;
    const int64_t num_chunks = (num_tasks + chunk_size - 1) / chunk_size;
    num_left_.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
    for (int64_t i = num_threads - 1; i >= 0; --i) {  // the caller's own last
      Share& share = shares_[static_cast<size_t>(i)];
      share.fn.store(fn, std::memory_order_relaxed);
      share.context.store(context, std::memory_order_relaxed);
      share.num_tasks.store(num_tasks, std::memory_order_relaxed);
      share.chunk_size.store(chunk_size, std::memory_order_relaxed);
      const Remaining all{job, static_cast<uint16_t>(num_chunks * i / num_threads),
                          static_cast<uint16_t>(num_chunks * (i + 1) / num_threads)};
      share.remaining.store(all.word(), std::memory_order_release);
    }
    job_.store(job);
    if (num_sleeping_.load() > 0) futex_wake(job_, static_cast<int>(std::min<int64_t>(num_chunks - 1, INT_MAX)));
    take_chunks(0);
    wait_for_others();
  }

 private:
  void work(size_t index) {
    is_inside_task = true;
    uint32_t seen = 0;
    while (!is_stopping_) {
      const auto has_new_job = [&] {
        return Remaining::from(shares_[index].remaining.load(std::memory_order_acquire)).job != seen;
      };
      if (!spin_until(has_new_job)) {
        ++num_sleeping_;
        futex_wait(job_, seen);
        --num_sleeping_;
      }
      seen = Remaining::from(shares_[index].remaining.load(std::memory_order_acquire)).job;
      take_chunks(index);
    }
  }

  // Runs the thread's own chunks in order, so that what lies side by side in memory is read by one thread; then what
  // others have left, from the end.
  void take_chunks(size_t own) {
    uint32_t num_done = 0;
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(own + i) % shares_.size()];
      while (take_chunk(share, i == 0)) ++num_done;
    }
    if (num_done == 0 || num_left_.fetch_sub(num_done) != num_done) return;
    if (is_caller_asleep_.load()) futex_wake(num_left_, 1);
  }

  // The job cannot end, nor the share's fields change, between a claim and the report that the chunk is done.
  static bool take_chunk(Share& share, bool is_own) {
    uint64_t word = share.remaining.load(std::memory_order_acquire);
    for (;;) {
      Remaining remaining = Remaining::from(word);
      if (remaining.is_empty()) return false;
      const auto fn = share.fn.load(std::memory_order_relaxed);
      const auto context = share.context.load(std::memory_order_relaxed);
      const int64_t num_tasks = share.num_tasks.load(std::memory_order_relaxed);
      const int64_t chunk_size = share.chunk_size.load(std::memory_order_relaxed);
      const int64_t chunk = is_own ? remaining.first++ : --remaining.end;
      if (!share.remaining.compare_exchange_weak(word, remaining.word(), std::memory_order_acq_rel)) continue;
      const int64_t end = std::min((chunk + 1) * chunk_size, num_tasks);
      for (int64_t task = chunk * chunk_size; task < end; ++task) fn(context, task);
      return true;
    }
  }

  void wait_for_others() {
    if (spin_until([&] { return num_left_.load(std::memory_order_acquire) == 0; })) return;
    is_caller_asleep_ = true;
    while (const uint32_t left = num_left_.load()) futex_wait(num_left_, left);
    is_caller_asleep_ = false;
  }

  std::vector<Share> shares_;  // the caller's first
  // Each on a cache line of its own: workers poll one while others are written.
  alignas(64) std::atomic<uint32_t> num_left_{0};  // chunks
  std::atomic<bool> is_caller_asleep_{false};
  alignas(64) std::atomic<uint32_t> job_{0};
  std::atomic<int> num_sleeping_{0};
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
