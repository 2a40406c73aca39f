// Vectors of float32, as wide as the instruction set has them. Compiled once per instruction set.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace apt::APT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecWord __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));
typedef int8_t VecBytes __attribute__((vector_size(kLanes)));

struct Bf16 {
  uint16_t bits;
};

inline Vec broadcast(float value) { return value - Vec{}; }  // x - 0 keeps -0, x + 0 does not

template <typename V>
inline V load_bits(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline VecWord load_words(const Bf16* from) {
#if defined(__AVX512F__)  // GCC 12 makes four instructions of the one below
  return (VecWord)_mm512_cvtepu16_epi32(load_bits<__m256i>(from));
#else
  return __builtin_convertvector(load_bits<VecHalf>(from), VecWord);
#endif
}

inline Vec load(const float* from) { return load_bits<Vec>(from); }
inline Vec load(const Bf16* from) { return (Vec)(load_words(from) << 16); }
inline Vec load(const int8_t* from) { return __builtin_convertvector(load_bits<VecBytes>(from), Vec); }

inline VecHalf to_bf16(Vec value) {
#if defined(__AVX512BF16__)
  return (VecHalf)_mm512_cvtneps_pbh((__m512)value);
#else
  const VecWord bits = (VecWord)value;
  const VecWord rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const VecWord result = value == value ? rounded : VecWord{} + 0x7fc0;
  return __builtin_convertvector(result, VecHalf);
#endif
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }
inline void store(Bf16* to, Vec value) {
  const VecHalf bits = to_bf16(value);
  std::memcpy(to, &bits, sizeof(bits));
}

inline float to_float(float value) { return value; }
inline float to_float(int8_t value) { return value; }
inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Value as it is after a round trip through storage of type T.
template <typename T>
inline Vec rounded(Vec value);
template <>
inline Vec rounded<float>(Vec value) {
  return value;
}
template <>
inline Vec rounded<Bf16>(Vec value) {
  return (Vec)(__builtin_convertvector(to_bf16(value), VecWord) << 16);
}

// The nearest integers, ties to even, of values below 2^22.
inline VecInt nearest(Vec value) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
  return (VecInt)_mm256_cvtps_epi32((__m256)value);
#else
  return (VecInt)(value + 0x1.8p23f) - 0x4b400000;  // the sum's lowest bits hold the integer
#endif
}

// The first `count` values at `from`, zeros after them; the memory beyond is not read.
template <typename T>
inline Vec load_first(const T* from, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, sizeof(T) * static_cast<size_t>(count));
  return load(buffer);
}

template <typename T>
inline void store_first(T* to, Vec value, int64_t count) {
  T buffer[kLanes];
  store(buffer, value);
  std::memcpy(to, buffer, sizeof(T) * static_cast<size_t>(count));
}

// `count` values, as many as a vector has or fewer.
template <typename T>
inline Vec load_some(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

template <typename T>
inline void store_some(T* to, Vec value, int64_t count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_first(to, value, count);
  }
}

// Calls f(offset, count) for each vector of a row; count is less than kLanes for a ragged last one only.
template <typename F>
inline void for_each_vec(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, int64_t{kLanes});
  if (i < size) f(i, size - i);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Halves are combined until one lane is left.
template <typename V, typename F>
inline auto reduce(V value, F combine) {
  auto lanes = load_bits<std::array<decltype(value[0] + value[0]), kLanes>>(&value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}

#if defined(__AVX512F__)  // the same, without a way through memory
inline float sum(Vec value) { return _mm512_reduce_add_ps((__m512)value); }
inline int32_t sum(VecInt value) { return _mm512_reduce_add_epi32((__m512i)value); }
inline int32_t max(VecInt value) { return _mm512_reduce_max_epi32((__m512i)value); }
#else
inline float sum(Vec value) { return reduce(value, [](float a, float b) { return a + b; }); }
inline int32_t sum(VecInt value) { return reduce(value, [](int32_t a, int32_t b) { return a + b; }); }
inline int32_t max(VecInt value) { return reduce(value, [](int32_t a, int32_t b) { return a > b ? a : b; }); }
#endif

inline float max(Vec value) { return reduce(value, [](float a, float b) { return a > b ? a : b; }); }

// Of magnitudes as integers, which have the order of the floats; NaN is the largest, so that it cannot get lost.
inline Vec largest_magnitude(Vec a, Vec b) {
  const VecInt x = (VecInt)a & 0x7fffffff, y = (VecInt)b & 0x7fffffff;
  return (Vec)(x > y ? x : y);
}

inline float largest_magnitude(Vec value) {
  const int32_t largest = max((VecInt)value & 0x7fffffff);
  return load_bits<float>(&largest);
}

// Into the second-level cache. The builtin does not do: GCC 12 drops calls of functions that do nothing but prefetch.
inline void prefetch_line(const void* address) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

// e^x to about 1 unit in the last place; exactly 0 below -87 (at -infinity, too), about 2e38 above 88.
inline Vec exp(Vec x) {
  constexpr float kLowest = -87.0f, kHighest = 88.0f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const Vec clamped = x > kHighest ? broadcast(kHighest) : x;
  const Vec shifted = clamped * 1.44269504f + kRounder;
  const Vec n = shifted - kRounder;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, in two parts
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // coefficients of Cephes' expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Vec power = (Vec)(((VecWord)shifted << 23) + (127u << 23));  // 2^n
  return x < kLowest ? Vec{} : p * power;
}

}  // namespace apt::APT_ISA
