// Norms, activation, and rope with the KV store. All arrays are contiguous unless a stride is given; bf16 or float32.
//
// Each value is rounded where the torch ops round it, so that a machine without these kernels gives the same answers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apt {

struct RmsNorm {
  const void* x;         // [rows, size]
  const void* residual;  // [rows, size], added to x first; or null
  const void* weight;    // [size]
  void* sum;             // [rows, size], x + residual; or null
  void* out;             // [rows, size]
  int64_t rows, size;
  float eps;
  bool is_bf16;
};

struct SiluAndMul {
  const void* gate_up;  // [rows, 2 size], gate and up side by side
  void* out;            // [rows, size]
  int64_t rows, size;
  bool is_bf16;
};

struct RopeAndStore {
  const void* qkv;  // [T, (num_heads + 2 num_kv_heads) head_dim]
  const void* cos;  // [T, head_dim / 2]
  const void* sin;
  const void* query_weight;  // [head_dim] of the norm before rope; or null
  const void* key_weight;
  void* query;  // [T, num_heads, head_dim]
  void* key_cache;    // as qkv; or int8, a scale times its bytes
  void* value_cache;
  float* key_scales;  // of an int8 cache; null of any other
  float* value_scales;
  const int64_t* slots;  // [T] block * block_size + offset; -1 = stored nowhere
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, block_size;
  int64_t block_stride, slot_stride, head_stride;  // of both caches, in elements
  int64_t scale_block_stride, scale_slot_stride, scale_head_stride;
  float eps;
  bool is_bf16;
};

}  // namespace apt

APT_FOR_EACH_ISA(void rms_norm(const RmsNorm& args); void silu_and_mul(const SiluAndMul& args);
                 void rope_and_store_kv(const RopeAndStore& args);)
