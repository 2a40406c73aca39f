// What training adds to the ops of inference: backward passes, and the softmax of the loss. All arrays are contiguous.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apt {

struct CrossEntropyStep {
  void* logits;            // [rows, size], bf16 or float32; over them goes their gradient, if it is wanted
  const int64_t* targets;  // [rows], from 0 to size - 1, or ignore_index
  float* losses;           // [rows]
  int64_t rows, size, ignore_index;
  float z_loss;
  bool with_gradient, is_bf16;
};

struct GatedSilu {
  const void* gate;  // [count], bf16 or float32, as all others
  const void* up;
  const void* out_grad;  // null: the forward pass
  void* out;             // of the forward pass
  void* gate_grad;       // of the backward pass
  void* up_grad;
  int64_t count;
  bool is_bf16;
};

struct TrainingNorm {
  const void* x;          // [rows, size], bf16 or float32
  const float* residual;  // [rows, size], added to x first; or null
  const float* weight;    // [size]
  float* total;           // [rows, size], what is normed
  float* inverse_rms;     // [rows]
  void* out;              // [rows, size], bf16 or float32
  int64_t rows, size;
  float eps;
  bool is_x_bf16, is_out_bf16;
};

struct TrainingNormBackward {
  const void* out_grad;     // [rows, size], as out
  const float* total_grad;  // [rows, size], what comes to the total past the norm; or null
  const float* total;
  const float* inverse_rms;
  const float* weight;
  float* residual_grad;  // [rows, size], of the total
  void* x_grad;          // [rows, size], the same as x's type; null where that is float32
  float* weight_parts;   // [norm_parts(rows), size], to be summed
  int64_t rows, size;
  bool is_out_bf16;
};

// Sums over rows are made of parts of so many rows, whatever the number of threads: the same bits in every run.
constexpr int64_t kRowsPerPart = 64;
inline int64_t norm_parts(int64_t rows) { return (rows + kRowsPerPart - 1) / kRowsPerPart; }

}  // namespace apt

APT_FOR_EACH_ISA(void cross_entropy_step(const CrossEntropyStep& args); void gated_silu(const GatedSilu& args);
                 void training_norm(const TrainingNorm& args);
                 void training_norm_backward(const TrainingNormBackward& args);)
