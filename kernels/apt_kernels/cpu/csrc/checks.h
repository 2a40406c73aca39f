// What the bindings check before a kernel, which checks nothing, gets raw pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "attention.h"

namespace apt::checks {

using at::Tensor;

inline bool is_bf16(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "must be float32 or bfloat16");
  return x.scalar_type() == at::kBFloat16;
}

inline void check_alike(const Tensor& x, const Tensor& like, const char* name) {
  TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.device() == like.device(), name, " has another type");
}

// Contiguous, and of the given type and number of elements.
inline Tensor operand(const Tensor& x, const Tensor& like, int64_t numel, const char* name) {
  check_alike(x, like, name);
  TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements, not ", numel);
  return x.contiguous();
}

inline const int32_t* int32_data(const Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kInt && x.is_contiguous(), name, " must be contiguous int32");
  return x.const_data_ptr<int32_t>();
}

// A KV cache as ops get it: of the queries' type, or int8 with scales.
struct KVCache {
  const Tensor& keys;    // [N, P, K, D]
  const Tensor& values;  // alike
  const std::optional<Tensor>& key_scales;  // float32 [N, P, K]
  const std::optional<Tensor>& value_scales;
};

inline void check_cache(const KVCache& cache, const Tensor& like) {
  const auto &key_cache = cache.keys, &value_cache = cache.values;
  const auto &key_scales = cache.key_scales, &value_scales = cache.value_scales;
  TORCH_CHECK(key_scales.has_value() == value_scales.has_value(), "value_scales go with key_scales");
  if (key_scales) {
    for (const Tensor& scales : {*key_scales, *value_scales})
      TORCH_CHECK(scales.scalar_type() == at::kFloat && scales.sizes() == key_cache.sizes().slice(0, 3) &&
                      scales.strides() == key_scales->strides(),
                  "scales must be float32 [N, P, K], alike");
    TORCH_CHECK(key_cache.scalar_type() == at::kChar && value_cache.scalar_type() == at::kChar,
                "caches with scales must be int8");
  } else {
    check_alike(key_cache, like, "key_cache");
    check_alike(value_cache, like, "value_cache");
  }
  TORCH_CHECK(key_cache.dim() == 4 && key_cache.sizes() == value_cache.sizes() &&
                  key_cache.strides() == value_cache.strides() && key_cache.stride(3) == 1,
              "caches must be [N, P, K, D], alike, and contiguous in D");
}

// Pointers and strides of a cache, for either kernel.
template <typename Args>
void set_cache(Args& args, const KVCache& cache) {
  args.key_cache = cache.keys.data_ptr();
  args.value_cache = cache.values.data_ptr();
  args.block_size = cache.keys.size(1);
  args.block_stride = cache.keys.stride(0);
  args.slot_stride = cache.keys.stride(1);
  args.head_stride = cache.keys.stride(2);
  if (!cache.key_scales) {
    args.key_scales = args.value_scales = nullptr;
    return;
  }
  args.key_scales = cache.key_scales->data_ptr<float>();
  args.value_scales = cache.value_scales->data_ptr<float>();
  args.scale_block_stride = cache.key_scales->stride(0);
  args.scale_slot_stride = cache.key_scales->stride(1);
  args.scale_head_stride = cache.key_scales->stride(2);
}

inline void check_slots(const int64_t* slots, int64_t count, int64_t num_slots) {
  int64_t highest = -1;
  for (int64_t i = 0; i < count; ++i) highest = slots[i] > highest ? slots[i] : highest;
  TORCH_CHECK(highest < num_slots, "slot_mapping: slot ", highest, " is beyond the cache's ", num_slots);
}

// Every key that attention will read lies in a block that exists, and every row of out has a query.
inline void check_layout(const apt::PagedAttention& a, int64_t num_tokens, int64_t num_blocks) {
  TORCH_CHECK(a.cu_seqlens_q[0] == 0 && a.cu_seqlens_q[a.num_seqs] == num_tokens, "cu_seqlens_q must end at T");
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) {
    const int64_t queries = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq], context = a.context_lens[seq];
    TORCH_CHECK(queries >= 0 && queries <= context, "context_lens: sequence ", seq, " is shorter than its queries");
    const int64_t blocks = (context + a.block_size - 1) / a.block_size;
    TORCH_CHECK(blocks <= a.table_stride, "block_tables: too short for sequence ", seq);
    uint32_t highest = 0;  // a negative block is a large one
    for (int64_t i = 0; i < blocks; ++i) {
      const auto block = static_cast<uint32_t>(a.block_tables[seq * a.table_stride + i]);
      highest = block > highest ? block : highest;
    }
    TORCH_CHECK(highest < num_blocks, "block_tables: sequence ", seq, " names a block that does not exist");
  }
}

}  // namespace apt::checks
