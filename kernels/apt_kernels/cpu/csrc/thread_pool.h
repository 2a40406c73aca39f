// A small persistent thread pool, shared by all ops of the process.
//
// Each thread has a share of consecutive tasks, which it runs in order: two threads that stream a matrix from memory read
// two streams and not one in turns, which is 10 % faster. A thread that has done its share takes tasks from the end of
// the others', so a thread that the machine delays delays only the task it is in. Idle workers spin for some tens of
// microseconds, which bridges the gap between two ops of a step, and then sleep: a spinning OpenMP pool makes a step many
// times slower as soon as another process wants a core.
#pragma once

#include <cstdint>
#include <type_traits>

namespace apt {

// Threads that take part in a parallel_for, the caller included. The default is the number of usable cores.
int num_threads();
void set_num_threads(int count);

// Calls fn(context, task) for each task of 0 .. num_tasks - 1 and returns when all are done.
// Calls from several threads take turns; a call from within a task runs inline. fn must not throw.
void run_tasks(int64_t num_tasks, void (*fn)(void* context, int64_t task), void* context);

// f(task) for each task of 0 .. num_tasks - 1, in parallel and in any order.
template <typename F>
void parallel_for(int64_t num_tasks, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_tasks(
      num_tasks, [](void* context, int64_t task) { (*static_cast<Function*>(context))(task); },
      const_cast<std::remove_const_t<Function>*>(&f));
}

// f(begin, end) over ranges that cover 0 .. count - 1, each at least `grain` long (the last may be shorter): for many
// small equal items. How the items are cut depends on the number of threads, so f must treat each item by itself.
template <typename F>
void parallel_for_ranges(int64_t count, int64_t grain, F&& f) {
  if (count <= 0) return;
  const int64_t even = (count + 4 * num_threads() - 1) / (4 * num_threads());
  const int64_t size = even > grain ? even : grain;
  parallel_for((count + size - 1) / size, [&](int64_t task) {
    const int64_t begin = task * size;
    f(begin, begin + size < count ? begin + size : count);
  });
}

}  // namespace apt
