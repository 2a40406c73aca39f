// Sixteen columns of a packed product, as one AVX-512 register or as several narrower ones.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "vec.h"

namespace apt::APT_ISA {

constexpr int kColumns = 16;
constexpr int kParts = kColumns / kLanes;

struct Floats {
  Vec part[kParts];
};

struct Ints {
  VecInt part[kParts];
};

inline uint32_t load_word(const void* from) { return load_bits<uint32_t>(from); }

inline Floats load_floats(const float* from) {
  Floats out;
  for (int i = 0; i < kParts; ++i) out.part[i] = load(from + i * kLanes);
  return out;
}

// The first `count` of sixteen values, zeros after them; none if count is negative.
inline Floats load_floats(const float* from, int64_t count) {
  if (count >= kColumns) return load_floats(from);
  float values[kColumns] = {};
  std::copy(from, from + std::clamp<int64_t>(count, 0, kColumns), values);
  return load_floats(values);
}

inline Floats load_half_floats(const void* from) {
  Floats out;
#if defined(__AVX512F__)
  out.part[0] = (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#else
  for (int i = 0; i < kParts; ++i) {
    const auto* half = static_cast<const uint16_t*>(from) + i * kLanes;
    const VecWord bits = __builtin_convertvector(load_bits<VecHalf>(half), VecWord);
    const VecWord magnitude = (bits & 0x7fff) << 13;
    // Times 2^112: moves the exponent's bias from 15 to 127 and makes subnormal numbers normal ones.
    out.part[i] = (Vec)((VecWord)((Vec)magnitude * 0x1p112f) | (bits & 0x8000) << 16);
  }
#endif
  return out;
}

inline Ints load_ints(const uint8_t* from) {
  Ints out;
  for (int i = 0; i < kParts; ++i) out.part[i] = load_bits<VecInt>(from + i * 4 * kLanes);
  return out;
}

inline Floats broadcast_floats(float value) {
  Floats out;
  for (auto& part : out.part) part = broadcast(value);
  return out;
}

inline Ints broadcast_ints(int32_t value) {
  Ints out;
  for (auto& part : out.part) part = VecInt{} + value;
  return out;
}

inline Floats operator*(Floats a, const Floats& b) {
  for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
  return a;
}

inline Floats operator+(Floats a, const Floats& b) {
  for (int i = 0; i < kParts; ++i) a.part[i] += b.part[i];
  return a;
}

inline Floats to_floats(const Ints& x) {
  Floats out;
  for (int i = 0; i < kParts; ++i) out.part[i] = __builtin_convertvector(x.part[i], Vec);
  return out;
}

inline Ints low_nibbles(Ints x) {
  for (auto& part : x.part) part &= 0x0f0f0f0f;
  return x;
}

inline Ints high_nibbles(Ints x) {
  for (auto& part : x.part) part = part >> 4 & 0x0f0f0f0f;
  return x;
}

// Two bf16 products per column: each word of w holds two weights, x two inputs.
inline Floats dot(Floats sums, const Ints& w, uint32_t x) {
#if defined(__AVX512BF16__)
  const __m512i inputs = _mm512_set1_epi32(static_cast<int>(x));
  sums.part[0] = (Vec)_mm512_dpbf16_ps((__m512)sums.part[0], (__m512bh)w.part[0], (__m512bh)inputs);
#else
  const Vec first = (Vec)(VecWord{} + (x << 16)), second = (Vec)(VecWord{} + (x & 0xffff0000));
  for (int i = 0; i < kParts; ++i) {
    const auto words = (VecWord)w.part[i];
    sums.part[i] += (Vec)(words << 16) * first;
    sums.part[i] += (Vec)(words & 0xffff0000) * second;
  }
#endif
  return sums;
}

// Four products of bytes per column, exact: each word of w holds four unsigned weights, x four signed inputs.
inline Ints dot(Ints sums, const Ints& w, uint32_t x) {
#if defined(__AVX512VNNI__)
  const __m512i inputs = _mm512_set1_epi32(static_cast<int>(x));
  sums.part[0] = (VecInt)_mm512_dpbusd_epi32((__m512i)sums.part[0], (__m512i)w.part[0], inputs);
#elif defined(__AVX2__)
  // Even and odd bytes apart, as 16-bit numbers: vpmaddubsw would saturate.
  const __m256i bytes = _mm256_set1_epi32(static_cast<int>(x)), low = _mm256_set1_epi16(255);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
  for (int i = 0; i < kParts; ++i) {
    const auto words = (__m256i)w.part[i];
    sums.part[i] += (VecInt)_mm256_madd_epi16(_mm256_and_si256(words, low), even);
    sums.part[i] += (VecInt)_mm256_madd_epi16(_mm256_srli_epi16(words, 8), odd);
  }
#else
  for (int i = 0; i < kParts; ++i) {
    for (int byte = 0; byte < 4; ++byte) {
      const int32_t input = static_cast<int8_t>(x >> 8 * byte);
      sums.part[i] += (w.part[i] >> 8 * byte & 255) * input;
    }
  }
#endif
  return sums;
}

// The first `count` of sixteen values.
template <typename T>
inline void store_floats(T* to, const Floats& values, int64_t count) {
  for (int i = 0; i < kParts && count > 0; ++i, count -= kLanes) {
    if (count >= kLanes) {
      store(to + i * kLanes, values.part[i]);
    } else {
      store_first(to + i * kLanes, values.part[i], count);
    }
  }
}

}  // namespace apt::APT_ISA
