#include "openmp.h"

#include <omp.h>

namespace apt {

int num_openmp_threads() { return omp_get_max_threads(); }

void run_on_openmp(int64_t num_tasks, void (*fn)(void* context, int64_t task), void* context) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < num_tasks; ++task) fn(context, task);
}

}  // namespace apt
