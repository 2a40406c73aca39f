// The kernel of the integer products. Inputs come as int8 with one scale per group, so that an outlier costs its own
// group only; the sums of a group are exact integers, and totals are float32.
#pragma once

#include "linear_quantize.h"
#include "linear_tile.h"

namespace apt::APT_ISA {

// Format has
//   kWordBytes: packed bytes of one word of inputs and a strip;
//   kIsPrefetched: whether fetching words takes longer than unpacking them;
//   load(weights, w): the words of 32 columns;
//   start(rows, index): what a group's sums start from;
//   add(rows, index, factors, sums, totals): a group's part of the totals, `factors` being what follows its weights;
//   finish(column, total).
template <typename Format>
struct GroupKernel {
  // Each sum needs an integer and a float register.
  static constexpr int kStrips = 1;

  const Linear& args;
  Format format;
  QuantizedRows rows;
  int64_t group_size;
  int64_t strip_bytes;

  template <int kRows, int kTileStrips, bool kIsStreaming>
  [[gnu::noinline]] void tile(int64_t row, int64_t strip) const {
    Floats totals[kRows][2];
    for (auto& total : totals) total[0] = total[1] = broadcast_floats(0.0f);
    const uint8_t* weights = args.packed + strip * strip_bytes;
    for (int64_t group = 0; group < rows.num_groups; ++group) {
      Ints sums[kRows][2];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = format.start(rows, index_of(row + r, group));
      const int64_t first = group * group_size;
      const int64_t words = round_up(std::min(group_size, args.in - first), 4) / 4;
      add_words<kRows, kIsStreaming>(rows.values + row * rows.stride + first, weights, words, sums);
      weights += words * Format::kWordBytes;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) format.add(rows, index_of(row + r, group), weights, sums[r], totals[r]);
      weights += Format::kFactorBytes;
    }
    const int64_t column = strip * kStripWidth;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store_strip(args, row + r, strip, format.finish(column, totals[r][0]),
                  format.finish(column + kColumns, totals[r][1]));
    }
  }

  int64_t index_of(int64_t row, int64_t group) const { return group * rows.num_rows + row; }

  template <int kRows, bool kIsStreaming>
  void add_words(const uint8_t* inputs, const uint8_t* weights, int64_t words, Ints (&sums)[kRows][2]) const {
    for (int64_t word = 0; word < words; ++word, weights += Format::kWordBytes, inputs += 4) {
      Ints w[2];
      Format::load(weights, w);
      if constexpr (kIsStreaming && kRows >= kMinPrefetchedRows && Format::kIsPrefetched) {
        for (int i = 0; i < Format::kWordBytes; i += 64)
          __builtin_prefetch(weights + kPrefetchedWords * Format::kWordBytes + i, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint32_t input = load_word(inputs + r * rows.stride);
        sums[r][0] = dot(sums[r][0], w[0], input);
        sums[r][1] = dot(sums[r][1], w[1], input);
      }
    }
  }
};

template <typename Format>
void run_groups(const Linear& args, const Format& format, int64_t group_size, int64_t strip_bytes) {
  run_product(GroupKernel<Format>{args, format, quantize_rows(args, group_size), group_size, strip_bytes});
}

}  // namespace apt::APT_ISA
