// 4-bit weights in groups: value = scale * weight + minimum.

#include "linear_group.h"

namespace apt::APT_ISA {
namespace {

struct Int4Format {
  static constexpr int kWordBytes = 64;
  static constexpr int kFactorBytes = 4 * kStripWidth;
  static constexpr bool kIsPrefetched = false;

  static void load(const uint8_t* weights, Ints (&w)[2]) {
    const Ints packed = load_ints(weights);
    w[0] = low_nibbles(packed);
    w[1] = high_nibbles(packed);
  }

  Ints start(const QuantizedRows&, int64_t) const { return broadcast_ints(0); }

  // input_scale * (scale * sum + minimum * sum of the inputs)
  void add(const QuantizedRows& rows, int64_t index, const uint8_t* factors, const Ints (&sums)[2],
           Floats (&totals)[2]) const {
    const float input_scale = rows.scales[index];
    const Floats offset = broadcast_floats(input_scale * static_cast<float>(rows.sums[index]));
    for (int half = 0; half < 2; ++half) {
      const Floats scales = load_half_floats(factors + 2 * kColumns * half);
      const Floats minima = load_half_floats(factors + 2 * kColumns * half + 2 * kStripWidth);
      const Floats scaled = to_floats(sums[half]) * broadcast_floats(input_scale);
      totals[half] = totals[half] + scaled * scales + offset * minima;
    }
  }

  Floats finish(int64_t, const Floats& total) const { return total; }
};

}  // namespace

void int4_linear(const Linear& args) {
  const int64_t strip_bytes = args.in / args.group_size * int4_group_bytes(args.group_size);
  run_groups(args, Int4Format{}, args.group_size, strip_bytes);
}

}  // namespace apt::APT_ISA
