// Tokens from logits: the most likely one, a draw from the filtered softmax, log-probabilities. bf16 or float32.
//
// No row is ever sorted. Tokens are ordered by their logits, equal ones by their ids.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apt {

struct Argmax {
  const void* logits;  // [rows, size]
  int64_t* token_ids;  // [rows]
  int64_t rows, size;  // size: 1 .. 2^31 - 1, here and below
  bool is_bf16;
};

struct Sample {
  const void* logits;        // [rows, size]
  const float* temperature;  // [rows]; 0 takes the most likely token
  const int64_t* top_k;      // [rows]; 0 keeps all
  const float* top_p;        // [rows]; 1 keeps all
  const float* min_p;        // [rows]; 0 keeps all
  const double* uniform;     // [rows], in [0, 1)
  int64_t* token_ids;        // [rows]
  int64_t rows, size;
  bool is_bf16;
};

struct TopLogprobs {
  const void* logits;        // [rows, size]
  const int64_t* token_ids;  // [rows], within the row
  float* chosen;             // [rows], of token_ids
  float* top;                // [rows, num_top], of the best tokens
  int64_t* top_ids;          // [rows, num_top]
  int64_t rows, size, num_top;
  bool is_bf16;
};

}  // namespace apt

APT_FOR_EACH_ISA(void argmax(const Argmax& args); void sample(const Sample& args);
                 void top_logprobs(const TopLogprobs& args);)
