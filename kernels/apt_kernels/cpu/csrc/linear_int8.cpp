// int8 weights with one scale per output.

#include "linear_group.h"

namespace apt::APT_ISA {
namespace {

struct Int8Format {
  static constexpr int kWordBytes = 128;
  static constexpr int kFactorBytes = 0;
  static constexpr bool kIsPrefetched = true;

  const Linear& args;

  static void load(const uint8_t* weights, Ints (&w)[2]) {
    w[0] = load_ints(weights);
    w[1] = load_ints(weights + 64);
  }

  // Packed weights are 128 too large.
  Ints start(const QuantizedRows& rows, int64_t index) const { return broadcast_ints(-128 * rows.sums[index]); }

  void add(const QuantizedRows& rows, int64_t index, const uint8_t*, const Ints (&sums)[2], Floats (&totals)[2]) const {
    const Floats scale = broadcast_floats(rows.scales[index]);
    for (int half = 0; half < 2; ++half) totals[half] = totals[half] + to_floats(sums[half]) * scale;
  }

  Floats finish(int64_t column, const Floats& total) const {
    return total * load_floats(args.scales + column, args.out_features - column);
  }
};

}  // namespace

void int8_linear(const Linear& args) {
  const int64_t strip_bytes = round_up(args.in, 4) * kStripWidth;
  run_groups(args, Int8Format{args}, kInt8InputGroup, strip_bytes);
}

}  // namespace apt::APT_ISA
