#include "linear_quantize.h"

#include <algorithm>

#include "int8_group.h"
#include "scratch.h"
#include "thread_pool.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kMinPerTask = 32768;  // inputs; below, handing work over takes longer than doing it
constexpr int64_t kAlignment = 64;

// `scales` and `sums` are those of the row's first group; the next group's are `stride` further.
template <typename T>
void quantize_row(const T* x, int64_t in, int64_t group_size, int8_t* values, float* scales, int32_t* sums,
                  int64_t stride) {
  for (int64_t first = 0; first < in; first += group_size, scales += stride, sums += stride) {
    const Int8Group group = quantize_group(x + first, std::min(group_size, in - first), values + first);
    *scales = group.scale;
    *sums = group.sum;
  }
  std::fill(values + in, values + round_up(in, 4), 0);
}

}  // namespace

QuantizedRows quantize_rows(const Linear& args, int64_t group_size) {
  thread_local Scratch values_memory, scales_memory, sums_memory;
  const int64_t num_groups = round_up(args.in, group_size) / group_size;
  const int64_t stride = round_up(args.in, kAlignment);
  auto* values = static_cast<int8_t*>(values_memory.get(args.rows * stride));
  auto* scales = static_cast<float*>(scales_memory.get(args.rows * num_groups * 4));
  auto* sums = static_cast<int32_t*>(sums_memory.get(args.rows * num_groups * 4));
  const int64_t grain = std::max<int64_t>(1, kMinPerTask / args.in);
  const int64_t in = args.in;
  parallel_for_ranges(args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int8_t* row_values = values + row * stride;
      const auto quantize = [&](const auto* x) {
        quantize_row(x + row * in, in, group_size, row_values, scales + row, sums + row, args.rows);
      };
      if (args.is_x_bf16) {
        quantize(static_cast<const Bf16*>(args.x));
      } else {
        quantize(static_cast<const float*>(args.x));
      }
    }
  });
  return {reinterpret_cast<const uint8_t*>(values), stride, scales, sums, num_groups, args.rows};
}

}  // namespace apt::APT_ISA
