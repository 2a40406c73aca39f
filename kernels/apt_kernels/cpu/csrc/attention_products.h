// The two products of attention over a tile of keys: scores, and weighted sums of values.
//
// A row's result depends on its query and the tile alone, and not on the other rows or their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "pack_tile.h"
#include "tile_matmul.h"
#include "vec.h"

namespace apt::APT_ISA {

constexpr int64_t kTile = 64;  // keys whose scores are held at a time

// Where keys and values lie, by key - first of the tile. A null row counts as zeros.
template <typename C>
struct Tile {
  const C* keys[kTile];
  const C* values[kTile];
  float key_scales[kTile];  // of an int8 cache; 0 of a null row
  float value_scales[kTile];
  int64_t count = 0;  // rows after these are null

  void clear() {
    std::fill_n(keys, kTile, nullptr);
    std::fill_n(values, kTile, nullptr);
    std::fill_n(key_scales, kTile, 0.0f);
    std::fill_n(value_scales, kTile, 0.0f);
    count = 0;
  }
  int64_t columns() const { return (count + 15) / 16 * 16; }
};

// Hands out pieces of one allocation, each on a cache line of its own. Without memory it only adds up what is needed.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    char* start = memory_ == nullptr ? nullptr : memory_ + size_;
    size_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    return reinterpret_cast<T*>(start);
  }
  int64_t size() const { return size_; }

 private:
  char* memory_;
  int64_t size_ = 0;
};

#if defined(__AVX512BF16__)
// For 32 * kChunks values from column d on: sums [kRows, dim] += weights [kRows, kTile / 2] times values. Of the last
// chunk `half` marks the values that exist.
template <int kRows, int kChunks>
inline void add_pairs_at(int64_t d, __mmask32 half, const uint32_t* weights, const Tile<Bf16>& tile,
                         const Tile<Bf16>& next, int64_t dim, float* sums) {
  alignas(64) constexpr uint16_t kInterleave[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kInterleave), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const auto last_lanes = static_cast<__mmask16>(half >> 16);
  const auto lanes = [&](int j) { return j == 2 * kChunks - 1 ? last_lanes : static_cast<__mmask16>(0xffff); };
  __m512 total[kRows][2 * kChunks];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kChunks; ++j)
      total[r][j] = _mm512_maskz_loadu_ps(lanes(j), sums + r * dim + d + 16 * j);
  for (int64_t i = 0; i < tile.count; i += 2) {
    const Bf16 *first = tile.values[i], *second = tile.values[i + 1];
    __m512bh pairs[2 * kChunks];
#pragma GCC unroll 8
    for (int c = 0; c < kChunks; ++c) {
      const __mmask32 mask = c == kChunks - 1 ? half : 0xffffffff;
      const __m512i x = first == nullptr ? __m512i{} : _mm512_maskz_loadu_epi16(mask, first + d + 32 * c);
      const __m512i y = second == nullptr ? __m512i{} : _mm512_maskz_loadu_epi16(mask, second + d + 32 * c);
      pairs[2 * c] = (__m512bh)_mm512_permutex2var_epi16(x, low, y);
      pairs[2 * c + 1] = (__m512bh)_mm512_permutex2var_epi16(x, high, y);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto word = (__m512bh)_mm512_set1_epi32(static_cast<int>(weights[r * kTile / 2 + i / 2]));
#pragma GCC unroll 8
      for (int j = 0; j < 2 * kChunks; ++j) total[r][j] = _mm512_dpbf16_ps(total[r][j], word, pairs[j]);
    }
    prefetch_rows(next.values + i, 2, d, d + 32 * kChunks);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kChunks; ++j) _mm512_mask_storeu_ps(sums + r * dim + d + 16 * j, lanes(j), total[r][j]);
}

template <int kRows>
void add_pairs(const uint32_t* weights, const Tile<Bf16>& tile, const Tile<Bf16>& next, int64_t dim, float* sums) {
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) add_pairs_at<kRows, 2>(d, 0xffffffff, weights, tile, next, dim, sums);
  for (; d < dim; d += 32)
    add_pairs_at<kRows, 1>(d, d + 32 <= dim ? 0xffffffff : 0xffff, weights, tile, next, dim, sums);
}

// The values stay where they lie: for up to kBlockRows rows that is faster than packing them. The sums are those of the
// packed product, bit for bit.
inline void add_pairs(int64_t rows, const uint32_t* weights, const Tile<Bf16>& tile, const Tile<Bf16>& next, int64_t dim, float* sums) {
  switch (rows) {
    case 1: return add_pairs<1>(weights, tile, next, dim, sums);
    case 2: return add_pairs<2>(weights, tile, next, dim, sums);
    case 3: return add_pairs<3>(weights, tile, next, dim, sums);
    case 4: return add_pairs<4>(weights, tile, next, dim, sums);
    case 5: return add_pairs<5>(weights, tile, next, dim, sums);
    case 6: return add_pairs<6>(weights, tile, next, dim, sums);
  }
}
#endif

// In floating point. T: storage of queries; C: of the cache.
template <typename T, typename C>
class FloatProducts {
  static constexpr bool kIsScaled = std::is_same_v<C, int8_t>;
  using Words = std::conditional_t<std::is_same_v<C, Bf16>, Bf16Words, Float32Words>;
  using Element = typename Words::Element;

 public:
  FloatProducts(Arena& arena, int64_t rows, int64_t dim)
      : rows_(rows),
        dim_(dim),
        packed_keys_(arena.take<uint32_t>(kTile * dim / Words::kPerWord)),
        packed_values_(arena.take<uint32_t>(kTile * dim / Words::kPerWord)),
        query_(arena.take<Element>(rows * dim)),
        weights_(arena.take<Element>(rows * kTile)) {}

  void set_query(int64_t row, const T* query) { copy_as(query, query_ + row * dim_, dim_); }

  // Into scores [rows, kTile]; those of columns without a key are undefined.
  void score(const Tile<C>& tile, const Tile<C>& next, float* scores) {
    const int64_t columns = tile.columns(), words = dim_ / Words::kPerWord;
    pack_keys<Words>(tile.keys, next.keys, columns, dim_, packed_keys_, kTile);
    multiply<Words>({as_words(query_), words, packed_keys_, kTile, scores, kTile, rows_, columns, words, false});
    if constexpr (kIsScaled) scale_rows(scores, tile.key_scales, scores);
  }

  // sums [rows, dim] += weights [rows, kTile] times values.
  void add_values(const Tile<C>& tile, const Tile<C>& next, const float* weights, float* sums) {
    if constexpr (kIsScaled) {
      scale_rows(weights, tile.value_scales, weights_);
    } else {
      copy_as(weights, weights_, rows_ * kTile);
    }
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<C, Bf16>) {
      if (rows_ <= kBlockRows) return add_pairs(rows_, as_words(weights_), tile, next, dim_, sums);
    }
#endif
    prefetch_rows(next.values, kTile, 0, dim_);
    pack_values<Words>(tile.values, tile.count, dim_, packed_values_);
    const int64_t words = (tile.count + Words::kPerWord - 1) / Words::kPerWord;
    multiply<Words>(
        {as_words(weights_), kTile / Words::kPerWord, packed_values_, dim_, sums, dim_, rows_, dim_, words, true});
  }

 private:
  static const uint32_t* as_words(const Element* x) { return reinterpret_cast<const uint32_t*>(x); }

  void scale_rows(const float* from, const float* scales, float* to) const {
    for (int64_t i = 0; i < rows_ * kTile; i += kLanes) store(to + i, load(from + i) * load(scales + i % kTile));
  }

  const int64_t rows_, dim_;
  uint32_t* packed_keys_;    // [head_dim words, kTile]
  uint32_t* packed_values_;  // [kTile words, head_dim]
  Element* query_;           // [rows, head_dim]
  Element* weights_;         // [rows, kTile]
};

#if defined(__AVX512VNNI__)
// In integers, over an int8 cache. A query and the weights of a tile are each a scale times 16-bit integers, kept as a
// high byte and a low one, so that their error is far below that of the cache; sums within a tile are exact.
template <typename T>
class ByteProducts {
  static constexpr float kMaxQuery = 127 * 256;  // the high byte is 127 at most, with low bytes of -128 .. 127
  static constexpr float kMaxWeight = 65535;
  static constexpr int kRowsTogether = 3;  // 2 x 3 x 4 sums

 public:
  ByteProducts(Arena& arena, int64_t rows, int64_t dim)
      : rows_(rows),
        dim_(dim),
        packed_keys_(arena.take<uint32_t>(kTile * dim / 4)),
        query_(arena.take<int8_t>(2 * rows * dim)),
        query_scales_(arena.take<float>(rows)),
        offsets_(arena.take<int32_t>(2 * rows)),
        products_(arena.take<float>(2 * rows * kTile)),
        weights_(arena.take<uint8_t>(2 * rows * kTile)),
        weight_scales_(arena.take<float>(rows)) {}

  void set_query(int64_t row, const T* query) {
    Vec largest_lanes{};
    for (int64_t d = 0; d < dim_; d += kLanes) largest_lanes = largest_magnitude(largest_lanes, load(query + d));
    const float largest = largest_magnitude(largest_lanes);
    const float inverse = largest > 0 ? kMaxQuery / largest : 0.0f;
    int8_t *high = query_ + 2 * row * dim_, *low = high + dim_;
    __m512i high_sum{}, low_sum{};
    for (int64_t d = 0; d < dim_; d += kLanes) {
      const __m512i value = _mm512_cvtps_epi32((__m512)(load(query + d) * inverse));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
      const __m512i lower = _mm512_sub_epi32(value, _mm512_slli_epi32(upper, 8));
      high_sum = _mm512_add_epi32(high_sum, upper);
      low_sum = _mm512_add_epi32(low_sum, lower);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + d), _mm512_cvtepi32_epi8(upper));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + d), _mm512_cvtepi32_epi8(lower));
    }
    query_scales_[row] = largest / kMaxQuery;
    offsets_[2 * row] = 128 * _mm512_reduce_add_epi32(high_sum);
    offsets_[2 * row + 1] = 128 * _mm512_reduce_add_epi32(low_sum);
  }

  void score(const Tile<int8_t>& tile, const Tile<int8_t>& next, float* scores) {
    const int64_t columns = tile.columns(), words = dim_ / 4;
    pack_keys<ByteWords>(tile.keys, next.keys, columns, dim_, packed_keys_, kTile);
    multiply<ByteWords>({reinterpret_cast<const uint32_t*>(query_), words, packed_keys_, kTile, products_, kTile,
                         2 * rows_, columns, words, false});
    for (int64_t r = 0; r < rows_; ++r) {
      const float* high = products_ + 2 * r * kTile;
      for (int64_t i = 0; i < columns; i += kLanes) {
        const Vec upper = __builtin_convertvector((VecInt)load(high + i) - offsets_[2 * r], Vec);
        const Vec lower = __builtin_convertvector((VecInt)load(high + kTile + i) - offsets_[2 * r + 1], Vec);
        store(scores + r * kTile + i, (upper * 256.0f + lower) * (load(tile.key_scales + i) * query_scales_[r]));
      }
    }
  }

  void add_values(const Tile<int8_t>& tile, const Tile<int8_t>& next, const float* weights, float* sums) {
    for (int64_t r = 0; r < rows_; ++r) set_weights(r, weights + r * kTile, tile.value_scales);
    for (int64_t d = 0; d < dim_; d += 64) {
      int64_t row = 0;
      for (; row + kRowsTogether <= rows_; row += kRowsTogether) add_quads<kRowsTogether>(row, d, tile, next, sums);
      if (rows_ - row == 2) add_quads<2>(row, d, tile, next, sums);
      if (rows_ - row == 1) add_quads<1>(row, d, tile, next, sums);
    }
  }

 private:
  void set_weights(int64_t row, const float* weights, const float* value_scales) {
    Vec scaled[kTile / kLanes], largest_lanes{};
    for (int i = 0; i < kTile / kLanes; ++i) {
      scaled[i] = load(weights + i * kLanes) * load(value_scales + i * kLanes);
      largest_lanes = largest_magnitude(largest_lanes, scaled[i]);
    }
    const float largest = largest_magnitude(largest_lanes);
    const float inverse = largest > 0 ? kMaxWeight / largest : 0.0f;
    uint8_t *high = weights_ + 2 * row * kTile, *low = high + kTile;
    for (int i = 0; i < kTile / kLanes; ++i) {
      const __m512i value = _mm512_cvtps_epi32((__m512)(scaled[i] * inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i * kLanes), _mm512_cvtepi32_epi8(_mm512_srli_epi32(value, 8)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i * kLanes), _mm512_cvtepi32_epi8(value));
    }
    weight_scales_[row] = largest / kMaxWeight;
  }

  // For columns d .. d + 63 of values, which stay where they lie.
  template <int kRows>
  void add_quads(int64_t row, int64_t d, const Tile<int8_t>& tile, const Tile<int8_t>& next, float* sums) const {
    const int64_t size = std::min<int64_t>(dim_ - d, 64);
    const __mmask64 mask = ~uint64_t{0} >> (64 - size);
    const auto* weights = reinterpret_cast<const uint32_t*>(weights_) + 2 * row * (kTile / 4);
    __m512i total[2 * kRows][4] = {};
    for (int64_t i = 0; i < tile.count; i += 4) {
      __m512i x[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        x[j] = tile.values[i + j] == nullptr ? __m512i{} : _mm512_maskz_loadu_epi8(mask, tile.values[i + j] + d);
      const __m512i pairs[4] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]),
                                _mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3])};
      // quads[j], 128-bit lane l: columns 16 l + 4 j .. 16 l + 4 j + 3.
      const __m512i quads[4] = {_mm512_unpacklo_epi16(pairs[0], pairs[2]), _mm512_unpackhi_epi16(pairs[0], pairs[2]),
                                _mm512_unpacklo_epi16(pairs[1], pairs[3]), _mm512_unpackhi_epi16(pairs[1], pairs[3])};
#pragma GCC unroll 8
      for (int r = 0; r < 2 * kRows; ++r) {
        const __m512i word = _mm512_set1_epi32(static_cast<int>(weights[r * (kTile / 4) + i / 4]));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) total[r][j] = _mm512_dpbusd_epi32(total[r][j], word, quads[j]);
      }
      if (row == 0) prefetch_rows(next.values + i, 4, d, d + size);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m512i t[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) t[j] = _mm512_add_epi32(_mm512_slli_epi32(total[2 * r][j], 8), total[2 * r + 1][j]);
      const __m512i a = _mm512_shuffle_i32x4(t[0], t[1], 0x44), b = _mm512_shuffle_i32x4(t[2], t[3], 0x44);
      const __m512i c = _mm512_shuffle_i32x4(t[0], t[1], 0xee), e = _mm512_shuffle_i32x4(t[2], t[3], 0xee);
      const __m512i columns[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
                                  _mm512_shuffle_i32x4(c, e, 0x88), _mm512_shuffle_i32x4(c, e, 0xdd)};
      float* to = sums + (row + r) * dim_ + d;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (16 * j >= size) break;
        const Vec fresh = __builtin_convertvector((VecInt)columns[j], Vec);
        store(to + 16 * j, load(to + 16 * j) + fresh * weight_scales_[row + r]);
      }
    }
  }

  const int64_t rows_, dim_;
  uint32_t* packed_keys_;  // [head_dim words, kTile], unsigned: 128 more
  int8_t* query_;          // [rows, 2, head_dim], high bytes and low bytes
  float* query_scales_;    // [rows]
  int32_t* offsets_;       // [rows, 2], what the 128 add to the products
  float* products_;        // [rows, 2, kTile] int32
  uint8_t* weights_;       // [rows, 2, kTile]
  float* weight_scales_;   // [rows]
};

template <typename T, typename C>
using Products = std::conditional_t<std::is_same_v<C, int8_t>, ByteProducts<T>, FloatProducts<T, C>>;
#else
template <typename T, typename C>
using Products = FloatProducts<T, C>;
#endif

}  // namespace apt::APT_ISA
