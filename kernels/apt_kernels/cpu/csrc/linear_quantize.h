// Inputs as the integer products read them: int8, one scale per group, made for each call.
#pragma once

#include "linear.h"

namespace apt::APT_ISA {

struct QuantizedRows {
  const uint8_t* values;  // [rows, stride] int8, zeros from `in` to the end of its word
  int64_t stride;         // bytes
  const float* scales;    // [num_groups, num_rows]
  const int32_t* sums;    // [num_groups, num_rows], of the group's values
  int64_t num_groups, num_rows;
};

// Each group as quantize_group makes it. Valid until this thread's next call.
QuantizedRows quantize_rows(const Linear& args, int64_t group_size);

}  // namespace apt::APT_ISA
