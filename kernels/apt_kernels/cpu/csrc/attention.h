// Causal attention of packed queries over a paged KV cache, prefill and decode mixed.
//
// The cache is float32 or bf16, as the queries are, or int8 with a scale for each token and kv head, of keys and of values:
// a key or value is its scale times its bytes.
//
// Keys are taken in tiles of 64 and tiles in splits of 256, counted from the start of the context; each split has an
// online softmax of its own, and splits are folded in ascending order. So the result of a query row depends on its
// context alone: not on its batch mates, on the chunk it is in, or on the number of threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace apt {

struct PagedAttention {
  const void* query;  // [T, num_heads, head_dim], contiguous
  const void* key_cache;
  const void* value_cache;
  const float* key_scales;  // of an int8 cache; null of any other
  const float* value_scales;
  void* out;  // as query
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* block_tables;  // [num_seqs, table_stride]
  int64_t table_stride;
  int64_t num_seqs, num_heads, num_kv_heads, block_size;
  int64_t head_dim;                                // a multiple of 16
  int64_t block_stride, slot_stride, head_stride;  // of both caches, in elements
  int64_t scale_block_stride, scale_slot_stride, scale_head_stride;
  int64_t window;                                  // keys a query sees, itself included; INT64_MAX without one
  float scale;
  bool is_bf16;  // queries and out, else float32
};

}  // namespace apt

APT_FOR_EACH_ISA(void paged_attention(const PagedAttention& args);)
