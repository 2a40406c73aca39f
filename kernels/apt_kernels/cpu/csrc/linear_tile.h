// What all packed products share: tiles of rows x strips in registers, tiles over tasks, sums to memory.
#pragma once

#include <type_traits>

#include "linear.h"
#include "linear_simd.h"
#include "silu.h"
#include "thread_pool.h"

namespace apt::APT_ISA {

#if defined(__AVX512F__)
constexpr int kMaxFewRows = 8;
constexpr int kTileRows = 6;
#else
constexpr int kMaxFewRows = 2;
constexpr int kTileRows = 2;
#endif
// One row takes its weights as fast as they come. Several keep the processor from looking that far ahead, so that weights
// are fetched these words before they are used.
constexpr int kMinPrefetchedRows = 3;
constexpr int64_t kPrefetchedWords = 64;
// Packed weights per task of few rows: little enough to share out evenly.
constexpr int64_t kTaskBytes = 32 * 1024;

template <typename T>
inline void store_features(const Linear& args, int64_t row, int64_t feature, const Floats& values) {
  T* to = static_cast<T*>(args.out) + row * args.out_features + feature;
  store_floats(to, values, args.out_features - feature);
}

inline void store_features(const Linear& args, int64_t row, int64_t feature, const Floats& values) {
  if (args.is_out_bf16) {
    store_features<Bf16>(args, row, feature, values);
  } else {
    store_features<float>(args, row, feature, values);
  }
}

// The 32 sums of one row and one strip.
inline void store_strip(const Linear& args, int64_t row, int64_t strip, Floats low, Floats high) {
  const int64_t column = strip * kStripWidth;
  if (args.bias != nullptr) {
    low = low + load_floats(args.bias + column, args.out_features - column);
    high = high + load_floats(args.bias + column + kColumns, args.out_features - column - kColumns);
  }
  store_features(args, row, column, low);
  store_features(args, row, column + kColumns, high);
}

// Calls f(first_row, number of rows) for tiles of at most `most` rows and nearly equal size.
template <typename F>
inline void for_tiles(int64_t begin, int64_t end, int64_t most, F f) {
  for (int64_t left = round_up(end - begin, most) / most; left > 0; --left) {
    const int64_t rows = (end - begin + left - 1) / left;
    f(begin, rows);
    begin += rows;
  }
}

// f with a number of rows, 1 to kMost, as a compile-time constant.
template <int kMost, typename F>
inline void with_rows(int64_t rows, F f) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Gates the rows' outputs of some strips of the gate; a task that computes them has them and those of up in its cache.
inline void gate_strips(const Linear& args, int64_t row, int64_t rows, int64_t strip, int64_t strips) {
  const int64_t inner = args.out_features / 2, column = strip * kStripWidth;
  const auto out = static_cast<const Bf16*>(args.out);
  const auto gated = static_cast<Bf16*>(args.gated);
  for (const int64_t end = row + rows; row < end; ++row) {
    const Bf16* gate = out + row * args.out_features + column;
    silu_and_mul_row(gate, gate + inner, gated + row * inner + column, strips * kStripWidth);
  }
}

// Few rows: strip after strip, each read from memory once. `strips` are those of the gate, if there is one.
template <typename Kernel>
void run_few_rows(const Kernel& kernel, int64_t strips) {
  const Linear& args = kernel.args;
  const int64_t wanted = round_up(strips * kernel.strip_bytes, kTaskBytes) / kTaskBytes;
  const int64_t tasks = std::min(strips, round_up(wanted, num_threads()));
  parallel_for(tasks, [&](int64_t task) {
    const int64_t first = strips * task / tasks, end = strips * (task + 1) / tasks;
    const auto multiply = [&](int64_t offset) {
      for (int64_t strip = first; strip < end; ++strip) {
        with_rows<kMaxFewRows>(args.rows, [&](auto rows) { kernel.template tile<rows(), 1, true>(0, offset + strip); });
      }
    };
    multiply(0);
    if (args.gated == nullptr) return;
    multiply(strips);
    gate_strips(args, 0, args.rows, first, end - first);
  });
}

// Many rows: a group of strips stays in the second-level cache while the rows pass by. `strips` as above.
template <typename Kernel>
void run_many_rows(const Kernel& kernel, int64_t strips) {
  constexpr int64_t kStrips = Kernel::kStrips;
  const Linear& args = kernel.args;
  const int64_t groups = round_up(strips, kStrips) / kStrips;
  const int64_t tiles = round_up(args.rows, kTileRows) / kTileRows;
  // Few groups of strips cannot be shared out evenly: cut the rows as well.
  const int64_t wanted_blocks = round_up(8 * num_threads(), groups) / groups;
  const int64_t blocks = num_threads() == 1 ? 1 : std::clamp<int64_t>(tiles / 3, 1, wanted_blocks);
  parallel_for(groups * blocks, [&](int64_t task) {
    const int64_t strip = task / blocks * kStrips, block = task % blocks;
    const bool is_whole = strip + kStrips <= strips;
    const auto multiply = [&](int64_t row, int64_t count, int64_t first) {
      with_rows<kTileRows>(count, [&](auto tile_rows) {
        if (is_whole) return kernel.template tile<tile_rows(), kStrips, false>(row, first);
        kernel.template tile<tile_rows(), 1, false>(row, first);
      });
    };
    for_tiles(args.rows * block / blocks, args.rows * (block + 1) / blocks, kTileRows, [&](int64_t row, int64_t count) {
      multiply(row, count, strip);
      if (args.gated == nullptr) return;
      multiply(row, count, strips + strip);
      gate_strips(args, row, count, strip, is_whole ? kStrips : 1);
    });
  });
}

// A kernel has `args`, `strip_bytes`, and tile<rows, strips, is_streaming>(first_row, first_strip), which computes and
// stores one tile: of at most kTileRows rows and kStrips strips or, is_streaming, of at most kMaxFewRows rows and one
// strip whose weights come from memory. A tile is no inline function: within a larger one GCC runs out of registers.
template <typename Kernel>
void run_product(const Kernel& kernel) {
  const int64_t all = num_strips(kernel.args.out_features), strips = kernel.args.gated == nullptr ? all : all / 2;
  if (kernel.args.rows <= kMaxFewRows) {
    run_few_rows(kernel, strips);
  } else {
    run_many_rows(kernel, strips);
  }
}

}  // namespace apt::APT_ISA
