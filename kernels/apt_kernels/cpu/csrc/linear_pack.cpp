// Packing of weights into strips; see linear.h for the layouts. Runs once per weight.

#include "linear.h"
#include "thread_pool.h"

namespace apt::APT_ISA {
namespace {

// [out, in] -> [strip][in / kPerWord][32][kPerWord].
template <typename T, int kPerWord, typename Convert>
void pack_words(const PackWeight& args, Convert convert) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t strip_size = round_up(args.in, kPerWord) * kStripWidth;
  parallel_for(num_strips(args.out), [&](int64_t strip) {
    T* target = static_cast<T*>(args.packed) + strip * strip_size;
    for (int64_t first = 0; first < args.in; first += kPerWord) {
      for (int64_t row = strip * kStripWidth; row < (strip + 1) * kStripWidth; ++row) {
        for (int64_t k = first; k < first + kPerWord; ++k) {
          *target++ = convert(row < args.out && k < args.in ? weight[row * args.in + k] : T{0});
        }
      }
    }
  });
}

void pack_nibbles(const PackWeight& args, int64_t first_row, int64_t first, uint8_t* target) {
  const auto* weight = static_cast<const uint8_t*>(args.weight);
  const auto value = [&](int64_t row, int64_t k) { return row < args.out ? weight[row * args.in + k] & 15 : 0; };
  for (int64_t k = first; k < first + args.group_size; k += 4) {
    for (int64_t row = first_row; row < first_row + kStripWidth / 2; ++row) {
      for (int64_t i = 0; i < 4; ++i) {
        *target++ = static_cast<uint8_t>(value(row, k + i) | value(row + kStripWidth / 2, k + i) << 4);
      }
    }
  }
}

}  // namespace

void pack_bf16(const PackWeight& args) {
  pack_words<uint16_t, 2>(args, [](uint16_t value) { return value; });
}

void pack_int8(const PackWeight& args) {
  pack_words<uint8_t, 4>(args, [](uint8_t value) { return static_cast<uint8_t>(value ^ 0x80); });
}

void pack_int4(const PackWeight& args) {
  const int64_t num_groups = args.in / args.group_size, group_bytes = int4_group_bytes(args.group_size);
  parallel_for(num_strips(args.out), [&](int64_t strip) {
    auto* target = static_cast<uint8_t*>(args.packed) + strip * num_groups * group_bytes;
    for (int64_t group = 0; group < num_groups; ++group, target += group_bytes) {
      pack_nibbles(args, strip * kStripWidth, group * args.group_size, target);
      auto* factors = reinterpret_cast<uint16_t*>(target + group_bytes - 4 * kStripWidth);
      for (int64_t column = 0; column < kStripWidth; ++column) {
        const int64_t row = strip * kStripWidth + column;
        factors[column] = row < args.out ? args.scales[row * num_groups + group] : 0;
        factors[column + kStripWidth] = row < args.out ? args.minima[row * num_groups + group] : 0;
      }
    }
  });
}

}  // namespace apt::APT_ISA
