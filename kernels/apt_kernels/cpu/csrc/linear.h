// Matrix products with packed weights: x [rows, in] times weight [out, in] transposed.
//
// A packed weight is a row of strips of 32 outputs. In a strip the weights lie in the order in which the kernels read
// them, so that one row of x streams the whole matrix once, front to back.
//
//   bf16  [strip][in / 2][32 outputs][2 inputs] bf16
//   int8  [strip][in / 4][32 outputs][4 inputs] uint8, the int8 weight + 128
//   int4  [strip][group]{ [group_size / 4][16 outputs][4 inputs] bytes: low nibble output j, high nibble output j + 16;
//                         [32] scales, [32] minima, float16 }
//
// What lies beyond the matrix is zero. Every sum runs over the inputs in ascending order into one accumulator, whatever
// the number of rows and of threads: a row's result does not depend on its company.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apt {

constexpr int64_t kStripWidth = 32;
// Inputs that share a scale in a product with int8 weights.
constexpr int64_t kInt8InputGroup = 32;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t num_strips(int64_t out_features) { return round_up(out_features, kStripWidth) / kStripWidth; }
inline int64_t int4_group_bytes(int64_t group_size) { return group_size * kStripWidth / 2 + 4 * kStripWidth; }

inline int64_t bf16_packed_bytes(int64_t out, int64_t in) { return num_strips(out) * kStripWidth * round_up(in, 2) * 2; }
inline int64_t int8_packed_bytes(int64_t out, int64_t in) { return num_strips(out) * kStripWidth * round_up(in, 4); }
inline int64_t int4_packed_bytes(int64_t out, int64_t in, int64_t group_size) {
  return num_strips(out) * in / group_size * int4_group_bytes(group_size);
}

// Weights [out, in], contiguous.
struct PackWeight {
  const void* weight;  // bf16, int8, or uint8 in 0 .. 15
  void* packed;
  int64_t out, in;
  const uint16_t* scales = nullptr;  // int4: [out, in / group_size] float16; value = scale * weight + minimum
  const uint16_t* minima = nullptr;
  int64_t group_size = 0;
};

struct Linear {
  const void* x;          // [rows, in] bf16, or float32 for int8 and int4
  const uint8_t* packed;
  void* out;              // [rows, out], bf16 or float32
  const float* bias;      // [out] in packed order, or null
  const float* scales;    // int8: [out] in packed order
  int64_t rows, in, out_features;
  int64_t group_size;  // int4
  bool is_x_bf16, is_out_bf16;
  // [rows, out / 2] bf16, or null: silu(gate) * up, of outputs that are gate and up side by side. They must be bf16, and
  // strips must not lie across both (can_gate).
  void* gated;
};

inline bool can_gate(int64_t out_features) { return out_features % (2 * kStripWidth) == 0; }

}  // namespace apt

APT_FOR_EACH_ISA(void pack_bf16(const PackWeight& args); void pack_int8(const PackWeight& args);
                 void pack_int4(const PackWeight& args); void bf16_linear(const Linear& args);
                 void int8_linear(const Linear& args); void int4_linear(const Linear& args);)
