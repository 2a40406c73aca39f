// bfloat16 weights and inputs, float32 sums.

#include "linear_tile.h"
#include "scratch.h"

namespace apt::APT_ISA {
namespace {

struct Bf16Kernel {
  static constexpr int kStrips = 2;

  const Linear& args;
  const uint8_t* x;
  int64_t x_stride;  // bytes
  int64_t num_words;
  int64_t strip_bytes;

  template <int kRows, int kTileStrips, bool kIsStreaming>
  [[gnu::noinline]] void tile(int64_t row, int64_t strip) const {
    constexpr int kVectors = 2 * kTileStrips;
    Floats sums[kRows][kVectors];
    for (auto& row_sums : sums) {
      for (auto& sum : row_sums) sum = broadcast_floats(0.0f);
    }
    const uint8_t* weights = args.packed + strip * strip_bytes;
    const uint8_t* inputs = x + row * x_stride;
    for (int64_t word = 0; word < num_words; ++word, weights += 128, inputs += 4) {
      if constexpr (kIsStreaming && kRows >= kMinPrefetchedRows) {
        __builtin_prefetch(weights + kPrefetchedWords * 128, 0, 2);
        __builtin_prefetch(weights + kPrefetchedWords * 128 + 64, 0, 2);
      }
      Ints w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = load_ints(weights + v / 2 * strip_bytes + v % 2 * 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint32_t input = load_word(inputs + r * x_stride);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = dot(sums[r][v], w[v], input);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int s = 0; s < kTileStrips; ++s) store_strip(args, row + r, strip + s, sums[r][2 * s], sums[r][2 * s + 1]);
    }
  }
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
  run_product(Bf16Kernel{args, x, num_words * 4, num_words, num_words * kStripWidth * 4});
}

}  // namespace apt::APT_ISA
