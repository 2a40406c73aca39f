// int8 weights with one scale per output, int8 inputs with one scale per row, exact int32 sums.

#include "linear_quantize.h"
#include "linear_tile.h"

namespace apt::APT_ISA {
namespace {

struct Int8Format {
  using Sums = Ints;

  const Linear& args;
  QuantizedRows rows;

  // Packed weights are 128 too large.
  Ints start(int64_t row) const { return broadcast_ints(-128 * rows.sums[row]); }

  Floats finish(int64_t row, int64_t column, const Ints& sums) const {
    const Floats scales = load_floats(args.scales + column, args.out_features - column);
    return to_floats(sums) * (broadcast_floats(rows.scales[row]) * scales);
  }
};

}  // namespace

void int8_linear(const Linear& args) {
  const QuantizedRows rows = quantize_rows(args, args.in);
  const int64_t num_words = round_up(args.in, 4) / 4;
  const WordKernel<Int8Format> kernel{args, {args, rows}, rows.values, rows.stride, num_words};
  run_product(kernel, args.rows, num_strips(args.out_features), kernel.strip_bytes());
}

}  // namespace apt::APT_ISA
