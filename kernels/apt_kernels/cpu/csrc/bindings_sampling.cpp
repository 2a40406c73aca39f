// torch's view of choosing tokens.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "isa.h"
#include "sampling.h"

namespace {

using at::Tensor;
using apt::checks::is_bf16;

Tensor rows_of(const Tensor& logits) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) < kMost, "logits must be [R, V]");
  return logits.contiguous();
}

Tensor per_row(const Tensor& x, const Tensor& logits, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.scalar_type() == type && x.dim() == 1 && x.size(0) == logits.size(0) && x.device().is_cpu(), name,
              " must be ", type, " [R]");
  return x.contiguous();
}

Tensor empty_ids(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kLong)); }

Tensor argmax(const Tensor& logits) {
  const Tensor x = rows_of(logits);
  Tensor out = empty_ids({x.size(0)});
  const apt::Argmax args{x.const_data_ptr(), out.mutable_data_ptr<int64_t>(), x.size(0), x.size(1), is_bf16(x)};
  APT_DISPATCH(argmax, args);
  return out;
}

Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& min_p, const Tensor& uniform) {
  const Tensor x = rows_of(logits), t = per_row(temperature, x, at::kFloat, "temperature");
  const Tensor k = per_row(top_k, x, at::kLong, "top_k"), p = per_row(top_p, x, at::kFloat, "top_p");
  const Tensor m = per_row(min_p, x, at::kFloat, "min_p"), u = per_row(uniform, x, at::kDouble, "uniform");
  Tensor out = empty_ids({x.size(0)});
  apt::Sample args{};
  args.logits = x.const_data_ptr();
  args.temperature = t.const_data_ptr<float>();
  args.top_k = k.const_data_ptr<int64_t>();
  args.top_p = p.const_data_ptr<float>();
  args.min_p = m.const_data_ptr<float>();
  args.uniform = u.const_data_ptr<double>();
  args.token_ids = out.mutable_data_ptr<int64_t>();
  args.rows = x.size(0);
  args.size = x.size(1);
  args.is_bf16 = is_bf16(x);
  APT_DISPATCH(sample, args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> top_logprobs(const Tensor& logits, const Tensor& token_ids, int64_t num_top) {
  const Tensor x = rows_of(logits), ids = per_row(token_ids, x, at::kLong, "token_ids");
  const int64_t rows = x.size(0), size = x.size(1);
  TORCH_CHECK(num_top >= 0 && num_top <= size, "num_top must be at most V");
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t id = ids.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(id >= 0 && id < size, "token_ids: ", id, " is not below ", size);
  }
  const auto floats = at::TensorOptions().dtype(at::kFloat);
  Tensor chosen = at::empty({rows}, floats), top = at::empty({rows, num_top}, floats);
  Tensor top_ids = empty_ids({rows, num_top});
  apt::TopLogprobs args{};
  args.logits = x.const_data_ptr();
  args.token_ids = ids.const_data_ptr<int64_t>();
  args.chosen = chosen.mutable_data_ptr<float>();
  args.top = top.mutable_data_ptr<float>();
  args.top_ids = top_ids.mutable_data_ptr<int64_t>();
  args.rows = rows;
  args.size = size;
  args.num_top = num_top;
  args.is_bf16 = is_bf16(x);
  APT_DISPATCH(top_logprobs, args);
  return {chosen, top, top_ids};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(apt_cpu, m) {
  m.def("argmax(Tensor logits) -> Tensor");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) -> Tensor");
  m.def("top_logprobs(Tensor logits, Tensor token_ids, int num_top) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(apt_cpu, CPU, m) {
  m.impl("argmax", argmax);
  m.impl("sample", sample);
  m.impl("top_logprobs", top_logprobs);
}
