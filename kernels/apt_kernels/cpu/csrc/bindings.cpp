// torch's view of attention and the elementwise ops: checks, strides, and the choice of the instruction set.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "attention.h"
#include "checks.h"
#include "elementwise.h"
#include "isa.h"
#include "thread_pool.h"

namespace {

using at::Tensor;
using namespace apt::checks;

std::tuple<Tensor, Tensor> norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
  const int64_t size = x.size(-1);
  const Tensor from = x.contiguous(), w = operand(weight, x, size, "weight");
  const Tensor added = residual != nullptr ? operand(*residual, x, x.numel(), "residual") : Tensor();
  Tensor out = at::empty_like(from), sum = residual != nullptr ? at::empty_like(from) : Tensor();
  apt::RmsNorm args{};
  args.x = from.const_data_ptr();
  args.weight = w.const_data_ptr();
  args.out = out.mutable_data_ptr();
  if (residual != nullptr) {
    args.residual = added.const_data_ptr();
    args.sum = sum.mutable_data_ptr();
  }
  args.size = size;
  args.rows = size == 0 ? 0 : x.numel() / size;
  args.eps = static_cast<float>(eps);
  args.is_bf16 = is_bf16(x);
  APT_DISPATCH(rms_norm, args);
  return {out, sum};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return std::get<0>(norm(x, nullptr, weight, eps));
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              double eps) {
  return norm(x, &residual, weight, eps);
}

Tensor silu_and_mul(const Tensor& gate_up) {
  const Tensor from = gate_up.contiguous();
  auto sizes = from.sizes().vec();
  TORCH_CHECK(!sizes.empty() && sizes.back() % 2 == 0, "gate_up must hold two halves");
  const int64_t size = sizes.back() /= 2;
  Tensor out = at::empty(sizes, from.options());
  const int64_t rows = size == 0 ? 0 : out.numel() / size;
  const apt::SiluAndMul args{from.const_data_ptr(), out.mutable_data_ptr(), rows, size, is_bf16(from)};
  APT_DISPATCH(silu_and_mul, args);
  return out;
}

Tensor rope_and_store_kv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, Tensor key_cache, Tensor value_cache,
                         const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales,
                         const Tensor& slot_mapping, int64_t num_heads, int64_t num_kv_heads,
                         const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                         double eps) {
  const KVCache cache{key_cache, value_cache, key_scales, value_scales};
  check_cache(cache, qkv);
  const int64_t tokens = qkv.size(0), dim = key_cache.size(3);
  TORCH_CHECK(key_cache.size(2) == num_kv_heads && dim % 2 == 0 && dim <= 1024, "key_cache does not fit");
  const Tensor x = operand(qkv, qkv, tokens * (num_heads + 2 * num_kv_heads) * dim, "qkv");
  const Tensor c = operand(cos, qkv, tokens * dim / 2, "cos"), s = operand(sin, qkv, tokens * dim / 2, "sin");
  const Tensor qw = query_weight ? operand(*query_weight, qkv, dim, "query_weight") : Tensor();
  const Tensor kw = key_weight ? operand(*key_weight, qkv, dim, "key_weight") : Tensor();
  TORCH_CHECK(slot_mapping.scalar_type() == at::kLong && slot_mapping.numel() == tokens, "slot_mapping must be [T]");
  const Tensor slots = slot_mapping.contiguous();
  check_slots(slots.const_data_ptr<int64_t>(), tokens, key_cache.size(0) * key_cache.size(1));
  Tensor query = at::empty({tokens, num_heads, dim}, qkv.options());
  apt::RopeAndStore args{};
  args.qkv = x.const_data_ptr();
  args.cos = c.const_data_ptr();
  args.sin = s.const_data_ptr();
  args.query_weight = query_weight ? qw.const_data_ptr() : nullptr;
  args.key_weight = key_weight ? kw.const_data_ptr() : nullptr;
  args.query = query.mutable_data_ptr();
  set_cache(args, cache);
  args.slots = slots.const_data_ptr<int64_t>();
  args.num_tokens = tokens;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = dim;
  args.eps = static_cast<float>(eps);
  args.is_bf16 = is_bf16(qkv);
  APT_DISPATCH(rope_and_store_kv, args);
  return query;
}

Tensor paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales,
                       const Tensor& cu_seqlens_q, const Tensor& context_lens, const Tensor& block_tables,
                       double scale, std::optional<int64_t> window) {
  const KVCache cache{key_cache, value_cache, key_scales, value_scales};
  check_cache(cache, query);
  const Tensor q = query.contiguous();
  TORCH_CHECK(q.dim() == 3 && q.size(2) == key_cache.size(3) && q.size(2) % 16 == 0, "head_dim: a multiple of 16");
  TORCH_CHECK(q.size(1) % key_cache.size(2) == 0, "key_cache: its heads do not divide those of query");
  TORCH_CHECK(scale > 0 && window.value_or(1) > 0, "scale and window must be positive");
  const Tensor tables = block_tables.contiguous();
  Tensor out = at::empty_like(q);
  apt::PagedAttention args{};
  args.query = q.const_data_ptr();
  set_cache(args, cache);
  args.out = out.mutable_data_ptr();
  args.cu_seqlens_q = int32_data(cu_seqlens_q, "cu_seqlens_q");
  args.context_lens = int32_data(context_lens, "context_lens");
  args.block_tables = int32_data(tables, "block_tables");
  args.num_seqs = context_lens.size(0);
  TORCH_CHECK(cu_seqlens_q.size(0) == args.num_seqs + 1 && tables.size(0) == args.num_seqs, "one entry per sequence");
  args.table_stride = tables.size(1);
  args.num_heads = q.size(1);
  args.num_kv_heads = key_cache.size(2);
  args.head_dim = q.size(2);
  args.window = window.value_or(std::numeric_limits<int64_t>::max());
  args.scale = static_cast<float>(scale);
  args.is_bf16 = is_bf16(q);
  check_layout(args, q.size(0), key_cache.size(0));
  APT_DISPATCH(paged_attention, args);
  return out;
}

std::string isa() {
  switch (apt::current_isa()) {
    case apt::Isa::avx512: return "avx512";
    case apt::Isa::avx2: return "avx2";
    case apt::Isa::portable: break;
  }
  return "portable";
}

bool set_isa(const std::string& name) {
  if (name == "avx512") return apt::set_isa(apt::Isa::avx512);
  if (name == "avx2") return apt::set_isa(apt::Isa::avx2);
  TORCH_CHECK(name == "portable", "no such instruction set: ", name);
  return apt::set_isa(apt::Isa::portable);
}

int64_t num_threads() { return apt::num_threads(); }
void set_num_threads(int64_t count) { apt::set_num_threads(static_cast<int>(count)); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(apt_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_and_mul(Tensor gate_up) -> Tensor");
  m.def(
      "rope_and_store_kv(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!)? key_scales, Tensor(d!)? value_scales, Tensor slot_mapping, int num_heads, int num_kv_heads, "
      "Tensor? query_weight, Tensor? key_weight, float eps) -> Tensor");
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? key_scales, Tensor? value_scales, "
      "Tensor cu_seqlens_q, Tensor context_lens, Tensor block_tables, float scale, int? window) -> Tensor");
  m.def("isa() -> str", isa);
  m.def("set_isa(str name) -> bool", set_isa);
  m.def("num_threads() -> int", num_threads);
  m.def("set_num_threads(int count) -> ()", set_num_threads);
}

TORCH_LIBRARY_IMPL(apt_cpu, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("fused_add_rms_norm", fused_add_rms_norm);
  m.impl("silu_and_mul", silu_and_mul);
  m.impl("rope_and_store_kv", rope_and_store_kv);
  m.impl("paged_attention", paged_attention);
}
