// The activation of a gated feed-forward.
#pragma once

#include "vec.h"

namespace apt::APT_ISA {

// silu(gate) * up, rounded in between as torch rounds it.
template <typename T>
inline void silu_and_mul_row(const T* gate, const T* up, T* out, int64_t size) {
  for_each_vec(size, [&](int64_t i, int64_t count) {
    const Vec x = load_some(gate + i, count);
    const Vec silu = rounded<T>(x / (1.0f + exp(-x)));
    store_some(out + i, silu * load_some(up + i, count), count);
  });
}

}  // namespace apt::APT_ISA
