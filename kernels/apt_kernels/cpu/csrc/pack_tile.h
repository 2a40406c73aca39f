// Brings rows of keys and values, scattered over the cache, into the layout that tile_matmul.h multiplies with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tile_matmul.h"

namespace apt::APT_ISA {

template <typename T, typename U>
inline void copy_as(const T* from, U* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(from + i));
}
inline void copy_as(const Bf16* from, Bf16* to, int64_t size) { std::copy_n(from, size, to); }

#if defined(__AVX512F__)
// Rows of 16 words each, up to `words` of which are read -> columns: out[w * out_stride + row]. A null row is zeros. The
// bits of `flipped` are flipped in every word.
inline void transpose_16x16(const void* const rows[16], int words, uint32_t flipped, uint32_t* out,
                            int64_t out_stride) {
  const __mmask16 mask = static_cast<__mmask16>((1u << words) - 1);
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = rows[i] == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi32(mask, rows[i]);
    if (flipped != 0) r[i] = _mm512_xor_si512(r[i], _mm512_set1_epi32(static_cast<int>(flipped)));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 g + j], lane l: word 4 l + j of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i columns[4] = {
        _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88), _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88),
        _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd), _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd)};
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; ++lane)
      if (4 * lane + j < words) _mm512_storeu_si512(out + (4 * lane + j) * out_stride, columns[lane]);
  }
}
#endif

// Fetches rows that will be read soon; null ones not.
template <typename T>
inline void prefetch_rows(const T* const* rows, int64_t count, int64_t first, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] == nullptr) continue;
    for (int64_t d = first; d < end; d += 64 / int64_t{sizeof(T)}) prefetch_line(rows[i] + d);
  }
}

// Keys as columns: word w of key i goes to out[w * out_stride + i]. A null row is zeros; count is a multiple of 16. Bytes
// become unsigned: 128 more. Meanwhile as many rows of `ahead` are fetched.
template <typename Words, typename T>
void pack_keys(const T* const* rows, const T* const* ahead, int64_t count, int64_t dim, uint32_t* out,
               int64_t out_stride) {
  const int64_t words = dim / Words::kPerWord;
#if defined(__AVX512F__)
  constexpr uint32_t kFlipped = std::is_same_v<T, int8_t> ? 0x80808080 : 0;
  if constexpr (std::is_same_v<T, typename Words::Element>) {
    for (int64_t i = 0; i < count; i += 16)
      for (int64_t w = 0; w < words; w += 16) {
        const void* starts[16];
        for (int j = 0; j < 16; ++j)
          starts[j] = rows[i + j] == nullptr ? nullptr : rows[i + j] + w * Words::kPerWord;
        const int some = static_cast<int>(std::min<int64_t>(words - w, 16));
        transpose_16x16(starts, some, kFlipped, out + w * out_stride + i, out_stride);
        prefetch_rows(ahead + i, 16, w * Words::kPerWord, (w + some) * Words::kPerWord);
      }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t w = 0; w < words; ++w) {
      const float value = rows[i] == nullptr ? 0.0f : to_float(rows[i][w]);
      std::memcpy(&out[w * out_stride + i], &value, sizeof(value));
    }
    prefetch_rows(ahead + i, 1, 0, dim);
  }
}

// Values as rows of words: [ceil(count / per word), dim]. A null row is zeros.
template <typename Words, typename T>
void pack_values(const T* const* rows, int64_t count, int64_t dim, uint32_t* out) {
  if constexpr (Words::kPerWord == 2) {
    for (int64_t i = 0; i < count; i += 2, out += dim) {
      const T* second = i + 1 < count ? rows[i + 1] : nullptr;
      for (int64_t d = 0; d < dim; d += kLanes) {
        const VecWord low = rows[i] == nullptr ? VecWord{} : load_words(rows[i] + d);
        const VecWord high = second == nullptr ? VecWord{} : load_words(second + d);
        const VecWord words = low | high << 16;
        std::memcpy(out + d, &words, sizeof(words));
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i, out += dim) {
      if (rows[i] == nullptr) {
        std::fill_n(out, dim, 0u);
      } else {
        copy_as(rows[i], reinterpret_cast<float*>(out), dim);
      }
    }
  }
}

}  // namespace apt::APT_ISA
