// 4-bit weights in groups: value = scale * weight + minimum. Inputs become int8 with one scale per group, too, so that
// an outlier costs its own group only.

#include "linear_quantize.h"
#include "linear_tile.h"

namespace apt::APT_ISA {
namespace {

struct Int4Kernel {
  // One: each sum needs an integer and a float register.
  static constexpr int kStrips = 1;

  const Linear& args;
  QuantizedRows rows;

  int64_t strip_bytes() const { return rows.num_groups * int4_group_bytes(args.group_size); }

  template <int kRows, int kTileStrips, bool kIsStreaming>
  void tile(int64_t row, int64_t strip) const {
    Floats totals[kRows][2];
    for (auto& total : totals) total[0] = total[1] = broadcast_floats(0.0f);
    const uint8_t* weights = args.packed + strip * strip_bytes();
    const uint8_t* inputs = rows.values + row * rows.stride;
    for (int64_t group = 0; group < rows.num_groups; ++group) {
      Ints sums[kRows][2];
      for (auto& sum : sums) sum[0] = sum[1] = broadcast_ints(0);
      for (int64_t i = 0; i < args.group_size; i += 4, weights += 64, inputs += 4) {
        const Ints packed = load_ints(weights);
        const Ints low = low_nibbles(packed), high = high_nibbles(packed);
        if constexpr (kIsStreaming) prefetch_ahead<64>(weights);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const uint32_t input = load_word(inputs + r * rows.stride);
          sums[r][0] = dot(sums[r][0], low, input);
          sums[r][1] = dot(sums[r][1], high, input);
        }
      }
      if constexpr (kIsStreaming) prefetch_ahead<128>(weights);
      add_group<kRows>(row, group, weights, sums, totals);
      weights += 4 * kStripWidth;
    }
    for (int r = 0; r < kRows; ++r) store_strip(args, row + r, strip, totals[r][0], totals[r][1]);
  }

  // totals += input_scale * (scale * sum + minimum * sum of the inputs)
  template <int kRows>
  void add_group(int64_t row, int64_t group, const uint8_t* factors, const Ints (&sums)[kRows][2],
                 Floats (&totals)[kRows][2]) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Floats scales = load_half_floats(factors + 2 * kColumns * half);
      const Floats minima = load_half_floats(factors + 2 * kColumns * half + 2 * kStripWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t index = (row + r) * rows.num_groups + group;
        const float input_scale = rows.scales[index];
        const Floats scaled = to_floats(sums[r][half]) * broadcast_floats(input_scale);
        const Floats offset = broadcast_floats(input_scale * static_cast<float>(rows.sums[index]));
        totals[r][half] = totals[r][half] + scaled * scales + offset * minima;
      }
    }
  }
};

}  // namespace

void int4_linear(const Linear& args) {
  const Int4Kernel kernel{args, quantize_rows(args, args.group_size)};
  run_product(kernel, args.rows, num_strips(args.out_features), kernel.strip_bytes());
}

}  // namespace apt::APT_ISA
