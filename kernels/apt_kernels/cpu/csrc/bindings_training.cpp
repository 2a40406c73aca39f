// torch's view of the ops of training; what they mean is said in apt_kernels/cpu/training.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "isa.h"
#include "training.h"

namespace {

using at::Tensor;
using apt::checks::is_bf16;
using apt::checks::operand;

void cross_entropy_step(Tensor logits, const Tensor& targets, Tensor losses, int64_t ignore_index, double z_loss,
                        bool with_gradient) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous [T, V]");
  const int64_t rows = logits.size(0);
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.numel() == rows, "targets must be int64 [T]");
  TORCH_CHECK(losses.scalar_type() == at::kFloat && losses.numel() == rows && losses.is_contiguous(),
              "losses must be contiguous float32 [T]");
  const Tensor wanted = targets.contiguous();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = wanted.const_data_ptr<int64_t>()[row];
    TORCH_CHECK_INDEX(id == ignore_index || (id >= 0 && id < logits.size(1)), "targets: ", id, " is no id");
  }
  const apt::CrossEntropyStep args{logits.mutable_data_ptr(), wanted.const_data_ptr<int64_t>(),
                                   losses.mutable_data_ptr<float>(), rows, logits.size(1), ignore_index,
                                   static_cast<float>(z_loss), with_gradient, is_bf16(logits)};
  APT_DISPATCH(cross_entropy_step, args);
}

Tensor gated_silu(const Tensor& gate, const Tensor& up) {
  const Tensor x = gate.contiguous(), y = operand(up, gate, gate.numel(), "up");
  Tensor out = at::empty_like(x);
  apt::GatedSilu args{};
  args.gate = x.const_data_ptr();
  args.up = y.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.count = x.numel();
  args.is_bf16 = is_bf16(x);
  APT_DISPATCH(gated_silu, args);
  return out;
}

std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& out_grad, const Tensor& gate, const Tensor& up) {
  const Tensor x = gate.contiguous(), y = operand(up, gate, gate.numel(), "up");
  const Tensor grad = operand(out_grad, gate, gate.numel(), "out_grad");
  Tensor gate_grad = at::empty_like(x), up_grad = at::empty_like(x);
  apt::GatedSilu args{};
  args.gate = x.const_data_ptr();
  args.up = y.const_data_ptr();
  args.out_grad = grad.const_data_ptr();
  args.gate_grad = gate_grad.mutable_data_ptr();
  args.up_grad = up_grad.mutable_data_ptr();
  args.count = x.numel();
  args.is_bf16 = is_bf16(x);
  APT_DISPATCH(gated_silu, args);
  return {gate_grad, up_grad};
}

Tensor floats(const Tensor& x, int64_t numel, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.numel() == numel, name, " must be float32 of the right size");
  return x.contiguous();
}

std::tuple<Tensor, Tensor, Tensor> training_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                 const Tensor& weight, double eps, at::ScalarType out_dtype) {
  const int64_t size = x.size(-1), rows = size == 0 ? 0 : x.numel() / size;
  const Tensor from = x.contiguous(), w = floats(weight, size, "weight");
  const Tensor added = residual ? floats(*residual, x.numel(), "residual") : Tensor();
  Tensor total = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  Tensor inverse_rms = at::empty({rows}, total.options()), out = at::empty(x.sizes(), x.options().dtype(out_dtype));
  apt::TrainingNorm args{};
  args.x = from.const_data_ptr();
  args.residual = residual ? added.const_data_ptr<float>() : nullptr;
  args.weight = w.const_data_ptr<float>();
  args.total = total.mutable_data_ptr<float>();
  args.inverse_rms = inverse_rms.mutable_data_ptr<float>();
  args.out = out.mutable_data_ptr();
  args.rows = rows;
  args.size = size;
  args.eps = static_cast<float>(eps);
  args.is_x_bf16 = is_bf16(from);
  args.is_out_bf16 = is_bf16(out);
  APT_DISPATCH(training_norm, args);
  return {out, total, inverse_rms};
}

std::tuple<Tensor, Tensor, Tensor> training_norm_backward(const Tensor& out_grad,
                                                          const std::optional<Tensor>& total_grad, const Tensor& total,
                                                          const Tensor& inverse_rms, const Tensor& weight,
                                                          at::ScalarType x_dtype) {
  const int64_t size = total.size(-1), rows = size == 0 ? 0 : total.numel() / size;
  const Tensor kept = floats(total, rows * size, "total"), w = floats(weight, size, "weight");
  const Tensor scales = floats(inverse_rms, rows, "inverse_rms"), grad = out_grad.contiguous();
  TORCH_CHECK(grad.numel() == rows * size, "out_grad does not fit");
  const Tensor past = total_grad ? floats(*total_grad, rows * size, "total_grad") : Tensor();
  Tensor residual_grad = at::empty_like(kept);
  Tensor x_grad = x_dtype == at::kFloat ? residual_grad : at::empty(kept.sizes(), kept.options().dtype(x_dtype));
  Tensor parts = at::empty({apt::norm_parts(rows), size}, kept.options());
  apt::TrainingNormBackward args{};
  args.out_grad = grad.const_data_ptr();
  args.total_grad = total_grad ? past.const_data_ptr<float>() : nullptr;
  args.total = kept.const_data_ptr<float>();
  args.inverse_rms = scales.const_data_ptr<float>();
  args.weight = w.const_data_ptr<float>();
  args.residual_grad = residual_grad.mutable_data_ptr<float>();
  args.x_grad = is_bf16(x_grad) ? x_grad.mutable_data_ptr() : nullptr;
  args.weight_parts = parts.mutable_data_ptr<float>();
  args.rows = rows;
  args.size = size;
  args.is_out_bf16 = is_bf16(grad);
  APT_DISPATCH(training_norm_backward, args);
  return {residual_grad, x_grad, parts.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(apt_cpu, m) {
  m.def(
      "cross_entropy_step(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, int ignore_index, float z_loss, "
      "bool with_gradient) -> ()");
  m.def("gated_silu(Tensor gate, Tensor up) -> Tensor");
  m.def("gated_silu_backward(Tensor out_grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def(
      "training_norm(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType out_dtype) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "training_norm_backward(Tensor out_grad, Tensor? total_grad, Tensor total, Tensor inverse_rms, Tensor weight, "
      "ScalarType x_dtype) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(apt_cpu, CPU, m) {
  m.impl("cross_entropy_step", cross_entropy_step);
  m.impl("gated_silu", gated_silu);
  m.impl("gated_silu_backward", gated_silu_backward);
  m.impl("training_norm", training_norm);
  m.impl("training_norm_backward", training_norm_backward);
}
