#include "isa.h"

#include <atomic>

namespace apt {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (has_avx2 && has_avx512) return Isa::avx512;
  if (has_avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa> chosen{best_isa()};

}  // namespace

Isa current_isa() { return chosen.load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  chosen = isa;
  return true;
}

}  // namespace apt
