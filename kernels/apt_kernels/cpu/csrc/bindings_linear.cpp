// torch's view of the packed matrix products.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>

#include "isa.h"
#include "linear.h"

namespace {

using at::Tensor;

constexpr int64_t kHugePage = 2 << 20, kChunkBytes = 64 << 20, kCacheLine = 64;

// Memory of huge pages, where the system has them; given back when the last weight in it goes.
struct Chunk {
  explicit Chunk(int64_t wanted) : bytes((wanted + kHugePage - 1) / kHugePage * kHugePage) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory for ", bytes, " bytes of packed weights");
    madvise(memory, bytes, MADV_HUGEPAGE);
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  ~Chunk() { munmap(memory, bytes); }

  const int64_t bytes;
  void* memory;
  int64_t used = 0;
};

// Memory for a packed weight. Weights that are packed one after another lie side by side, as they will be read: pages of
// their own, or small ones, cost a tenth of the bandwidth.
Tensor empty_packed(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> current;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Chunk> chunk = current.lock();
  if (chunk == nullptr || chunk->used + bytes > chunk->bytes) {
    chunk = std::make_shared<Chunk>(std::max(bytes, kChunkBytes));
    current = chunk;
  }
  char* start = static_cast<char*>(chunk->memory) + chunk->used;
  chunk->used += (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  return at::from_blob(start, {bytes}, [chunk](void*) {}, at::TensorOptions().dtype(at::kByte));
}

void check_weight(const Tensor& weight, at::ScalarType type) {
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == type && weight.is_contiguous(), "weight: contiguous [out, in] of ",
              type);
}

Tensor pack_bf16(const Tensor& weight) {
  check_weight(weight, at::kBFloat16);
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor packed = empty_packed(apt::bf16_packed_bytes(out, in));
  const apt::PackWeight args{weight.const_data_ptr(), packed.mutable_data_ptr(), out, in};
  APT_DISPATCH(pack_bf16, args);
  return packed;
}

Tensor pack_int8(const Tensor& weight) {
  check_weight(weight, at::kChar);
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor packed = empty_packed(apt::int8_packed_bytes(out, in));
  const apt::PackWeight args{weight.const_data_ptr(), packed.mutable_data_ptr(), out, in};
  APT_DISPATCH(pack_int8, args);
  return packed;
}

const uint16_t* half_data(const Tensor& x, int64_t numel, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kHalf && x.is_contiguous() && x.numel() == numel, name, ": float16, one per group");
  return static_cast<const uint16_t*>(x.const_data_ptr());
}

void check_group_size(int64_t in, int64_t group_size) {
  TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, "group_size: 32, 64 or 128");
  TORCH_CHECK(in % group_size == 0, "in: a multiple of group_size");
}

Tensor pack_int4(const Tensor& weight, const Tensor& scales, const Tensor& minima, int64_t group_size) {
  check_weight(weight, at::kByte);
  const int64_t out = weight.size(0), in = weight.size(1);
  check_group_size(in, group_size);
  const int64_t num_groups = out * (in / group_size);
  Tensor packed = empty_packed(apt::int4_packed_bytes(out, in, group_size));
  apt::PackWeight args{weight.const_data_ptr(), packed.mutable_data_ptr(), out, in};
  args.scales = half_data(scales, num_groups, "scales");
  args.minima = half_data(minima, num_groups, "minima");
  args.group_size = group_size;
  APT_DISPATCH(pack_int4, args);
  return packed;
}

const float* float_data(const Tensor& x, int64_t numel, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() == numel, name, ": contiguous float32 [out]");
  return x.const_data_ptr<float>();
}

// What the three products have in common; allocates the result.
struct Call {
  Tensor x, out;
  apt::Linear args{};

  Call(const Tensor& input, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias,
       at::ScalarType out_type)
      : x(input.contiguous()) {
    TORCH_CHECK(x.dim() == 2, "x: [rows, in]");
    TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, "x: float32 or bfloat16");
    TORCH_CHECK(out_type == at::kBFloat16 || out_type == at::kFloat, "out_dtype: float32 or bfloat16");
    out = at::empty({x.size(0), out_features}, x.options().dtype(out_type));
    args.x = x.const_data_ptr();
    args.packed = packed.const_data_ptr<uint8_t>();
    args.out = out.mutable_data_ptr();
    args.bias = bias ? float_data(*bias, out_features, "bias") : nullptr;
    args.rows = x.size(0);
    args.in = x.size(1);
    args.out_features = out_features;
    args.is_x_bf16 = x.scalar_type() == at::kBFloat16;
    args.is_out_bf16 = out_type == at::kBFloat16;
  }

  bool is_empty() const { return out.numel() == 0; }
};

void check_packed(const Tensor& packed, int64_t bytes) {
  TORCH_CHECK(packed.is_contiguous() && packed.numel() == bytes, "packed: does not fit x and out_features");
}

Tensor linear_bf16(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias,
                   at::ScalarType out_dtype) {
  Call call(x, packed, out_features, bias, out_dtype);
  TORCH_CHECK(call.args.is_x_bf16, "x: bfloat16");
  check_packed(packed, apt::bf16_packed_bytes(out_features, call.args.in));
  if (!call.is_empty()) APT_DISPATCH(bf16_linear, call.args);
  return call.out;
}

Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t out_features,
                   const std::optional<Tensor>& bias, at::ScalarType out_dtype) {
  Call call(x, packed, out_features, bias, out_dtype);
  check_packed(packed, apt::int8_packed_bytes(out_features, call.args.in));
  call.args.scales = float_data(scales, out_features, "scales");
  if (!call.is_empty()) APT_DISPATCH(int8_linear, call.args);
  return call.out;
}

Tensor linear_int4(const Tensor& x, const Tensor& packed, int64_t group_size, int64_t out_features,
                   const std::optional<Tensor>& bias, at::ScalarType out_dtype) {
  Call call(x, packed, out_features, bias, out_dtype);
  check_group_size(call.args.in, group_size);
  check_packed(packed, apt::int4_packed_bytes(out_features, call.args.in, group_size));
  call.args.group_size = group_size;
  if (!call.is_empty()) APT_DISPATCH(int4_linear, call.args);
  return call.out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(apt_cpu, m) {
  m.def("pack_bf16(Tensor weight) -> Tensor");
  m.def("pack_int8(Tensor weight) -> Tensor");
  m.def("pack_int4(Tensor weight, Tensor scales, Tensor minima, int group_size) -> Tensor");
  m.def(
      "linear_bf16(Tensor x, Tensor packed, int out_features, Tensor? bias, ScalarType out_dtype) "
      "-> Tensor");
  m.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scales, int out_features, Tensor? bias, ScalarType out_dtype) "
      "-> Tensor");
  m.def(
      "linear_int4(Tensor x, Tensor packed, int group_size, int out_features, Tensor? bias, ScalarType out_dtype) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(apt_cpu, CPU, m) {
  m.impl("pack_bf16", pack_bf16);
  m.impl("pack_int8", pack_int8);
  m.impl("pack_int4", pack_int4);
  m.impl("linear_bf16", linear_bf16);
  m.impl("linear_int8", linear_int8);
  m.impl("linear_int4", linear_int4);
}
