// Every task of every parallel_for runs exactly once: with several callers, nested calls and changing numbers of threads.
#include <atomic>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

std::atomic<int> num_wrong{0};

void hammer(int seed) {
  for (int round = 0; round < 3000; ++round) {
    std::vector<int> runs(1 + (round * 7 + seed) % 9, 0);
    apt::parallel_for(static_cast<int64_t>(runs.size()), [&](int64_t task) { ++runs[task]; });
    for (int count : runs) num_wrong += count != 1;
  }
}

void check_ranges(int64_t count, int64_t grain) {
  std::vector<int> runs(count, 0);
  apt::parallel_for_ranges(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++runs[i];
  });
  for (int times : runs) num_wrong += times != 1;
}

}  // namespace

int main() {
  apt::set_num_threads(4);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(hammer, i);
  for (auto& caller : callers) caller.join();
  for (int threads = 1; threads < 6; ++threads) {
    apt::set_num_threads(threads);
    hammer(threads);
    for (int64_t count : {0, 1, 2, 7, 100, 1001}) check_ranges(count, 16);
  }
  std::atomic<int> sum{0};
  apt::parallel_for(10, [&](int64_t) { apt::parallel_for(10, [&](int64_t) { ++sum; }); });
  return num_wrong == 0 && sum == 100 ? 0 : 1;
}
