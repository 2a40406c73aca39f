// bfloat16 weights and inputs, float32 sums.

#include "linear_tile.h"
#include "scratch.h"

namespace apt::APT_ISA {
namespace {

struct Bf16Format {
  using Sums = Floats;

  Floats start(int64_t) const { return broadcast_floats(0.0f); }
  Floats finish(int64_t, int64_t, const Floats& sums) const { return sums; }
};

// Rows with a zero behind each: an odd number of inputs does not fill the last word.
const uint8_t* pad_rows(const Linear& args) {
  thread_local Scratch scratch;
  const int64_t bytes = 2 * args.in;
  auto* padded = static_cast<uint8_t*>(scratch.get(args.rows * (bytes + 2)));
  for (int64_t row = 0; row < args.rows; ++row) {
    std::memcpy(padded + row * (bytes + 2), static_cast<const uint8_t*>(args.x) + row * bytes, bytes);
    std::memset(padded + row * (bytes + 2) + bytes, 0, 2);
  }
  return padded;
}

}  // namespace

void bf16_linear(const Linear& args) {
  const uint8_t* x = args.in % 2 == 0 ? static_cast<const uint8_t*>(args.x) : pad_rows(args);
  const int64_t num_words = round_up(args.in, 2) / 2;
  const WordKernel<Bf16Format> kernel{args, {}, x, num_words * 4, num_words};
  run_product(kernel, args.rows, num_strips(args.out_features), kernel.strip_bytes());
}

}  // namespace apt::APT_ISA
