// A job's tasks on the threads of the process's OpenMP runtime, which is torch's.
#pragma once

#include <cstdint>

namespace apt {

// How many threads a parallel region of the caller's gets.
int num_openmp_threads();

// fn(context, task) for each task of 0 .. num_tasks - 1; an Executor, see thread_pool.h.
void run_on_openmp(int64_t num_tasks, void (*fn)(void* context, int64_t task), void* context);

}  // namespace apt
