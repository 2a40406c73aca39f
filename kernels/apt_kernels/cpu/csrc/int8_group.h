// Values as int8 times one scale: inputs of the integer products, and heads in an int8 KV cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace apt::APT_ISA {

constexpr float kSmallestMagnitude = 1e-36f;  // less counts as zero: 127 over it is infinite

struct Int8Group {
  float scale;
  int32_t sum;  // of the integers
};

// The largest magnitude becomes 127. A NaN or an infinity makes the scale one.
template <typename T>
inline Int8Group quantize_group(const T* x, int64_t count, int8_t* values) {
  Vec largest_lanes{};
  for_each_vec(count, [&](int64_t i, int64_t some) {
    largest_lanes = largest_magnitude(largest_lanes, load_some(x + i, some));
  });
  const float largest = largest_magnitude(largest_lanes);
  const float inverse = largest > kSmallestMagnitude ? 127.0f / largest : 0.0f;
  VecInt sums{};
  for_each_vec(count, [&](int64_t i, int64_t some) {
    const VecInt rounded = nearest(load_some(x + i, some) * inverse);
    sums += rounded;
    const VecBytes bytes = __builtin_convertvector(rounded, VecBytes);
    std::memcpy(values + i, &bytes, static_cast<size_t>(some));
  });
  return {largest / 127.0f, sum(sums)};
}

}  // namespace apt::APT_ISA
