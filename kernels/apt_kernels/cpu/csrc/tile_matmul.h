// Small matrix products over operands in the first-level cache: c [M, N] = (c +) a [M, K] times b [K, N].
//
// Operands are made of 32-bit words: a float32, a pair of bf16 or four bytes that belong to neighbouring k. A word of a
// meets a row of words of b, so that no sum ever runs across a vector. Each element of c is one sum in ascending k, whatever the
// sizes: a row's result does not depend on the other rows.
#pragma once

#include <cstdint>

#include "vec.h"

namespace apt::APT_ISA {

// How words are multiplied, and the storage types they are made from.
struct Float32Words {
  using Element = float;
  static constexpr int kPerWord = 1;
  static Vec multiply_add(Vec sum, VecWord a, VecWord b) { return (Vec)a * (Vec)b + sum; }
};

#if defined(__AVX512BF16__)
struct Bf16Words {
  using Element = Bf16;
  static constexpr int kPerWord = 2;
  static Vec multiply_add(Vec sum, VecWord a, VecWord b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
using Bf16Words = Float32Words;  // bf16 is widened when operands are packed
#endif

#if defined(__AVX512VNNI__)
// Signed bytes of a times unsigned bytes of b; c is int32, exact.
struct ByteWords {
  using Element = int8_t;
  static constexpr int kPerWord = 4;
  static Vec multiply_add(Vec sum, VecWord a, VecWord b) {
    return (Vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
  }
};
#endif

#if defined(__AVX512F__)
constexpr int kBlockColumns = 4;  // vectors; 6 x 4 sums, 4 columns and a broadcast fill 29 of 32 registers
#else
constexpr int kBlockColumns = 2;  // 6 x 2 sums, 2 columns and a broadcast fill 15 of 16 registers
#endif
constexpr int kBlockRows = 6;

struct TileMatmul {
  const uint32_t* a;
  int64_t a_stride;  // words
  const uint32_t* b;
  int64_t b_stride;  // words
  float* c;
  int64_t c_stride;
  int64_t rows, columns, words;  // M, N (a multiple of kLanes), K in words
  bool accumulates;
};

template <typename Words, int kRows, int kColumns>
inline void multiply_block(const TileMatmul& t, int64_t row, int64_t column) {
  const uint32_t* a = t.a + row * t.a_stride;
  const uint32_t* b = t.b + column;
  float* c = t.c + row * t.c_stride + column;
  Vec sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sums[i][j] = t.accumulates ? load(c + i * t.c_stride + j * kLanes) : Vec{};
  for (int64_t k = 0; k < t.words; ++k) {
    VecWord columns[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) columns[j] = load_bits<VecWord>(b + k * t.b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const VecWord word = VecWord{} + a[i * t.a_stride + k];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sums[i][j] = Words::multiply_add(sums[i][j], word, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) store(c + i * t.c_stride + j * kLanes, sums[i][j]);
}

template <typename Words, int kColumns>
inline void multiply_columns(const TileMatmul& t, int64_t column) {
  int64_t row = 0;
  for (; row + kBlockRows <= t.rows; row += kBlockRows) multiply_block<Words, kBlockRows, kColumns>(t, row, column);
  switch (t.rows - row) {
    case 1: return multiply_block<Words, 1, kColumns>(t, row, column);
    case 2: return multiply_block<Words, 2, kColumns>(t, row, column);
    case 3: return multiply_block<Words, 3, kColumns>(t, row, column);
    case 4: return multiply_block<Words, 4, kColumns>(t, row, column);
    case 5: return multiply_block<Words, 5, kColumns>(t, row, column);
  }
}

template <typename Words>
void multiply(const TileMatmul& t) {
  constexpr int64_t kWide = kBlockColumns * kLanes;
  int64_t column = 0;
  for (; column + kWide <= t.columns; column += kWide) multiply_columns<Words, kBlockColumns>(t, column);
  for (; column < t.columns; column += kLanes) multiply_columns<Words, 1>(t, column);
}

}  // namespace apt::APT_ISA
