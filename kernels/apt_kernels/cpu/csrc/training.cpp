#include "training.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "silu.h"
#include "thread_pool.h"
#include "vec.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kPerTask = 32768;  // elements

template <typename T>
float largest(const T* x, int64_t size) {
  Vec most = broadcast(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) most = max(most, load(x + i));
  float result = max(most);
  for (; i < size; ++i) result = std::max(result, to_float(x[i]));
  return result;
}

template <typename T>
float sum_of_exp(const T* x, int64_t size, float shift) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) total += exp(load(x + i) - shift);
  float result = sum(total);
  for (; i < size; ++i) result += std::exp(to_float(x[i]) - shift);
  return result;
}

template <typename T>
void cross_entropy_row(const CrossEntropyStep& a, int64_t row) {
  T* logits = static_cast<T*>(a.logits) + row * a.size;
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {
    a.losses[row] = 0.0f;
    if (a.with_gradient) std::fill_n(logits, a.size, T{});
    return;
  }
  // A NaN among the logits may escape the maximum, but not the sum.
  const float most = largest(logits, a.size);
  const float logsumexp = most + std::log(sum_of_exp(logits, a.size, most));
  a.losses[row] = logsumexp - to_float(logits[target]) + a.z_loss * logsumexp * logsumexp;
  if (!a.with_gradient) return;
  const float factor = 1.0f + 2.0f * a.z_loss * logsumexp;
  const float chosen = std::exp(to_float(logits[target]) - logsumexp) * factor - 1.0f;
  for_each_vec(a.size, [&](int64_t i, int64_t count) {
    store_some(logits + i, exp(load_some(logits + i, count) - logsumexp) * factor, count);
  });
  store_first(logits + target, broadcast(chosen), 1);
}

template <typename T>
void cross_entropy_as(const CrossEntropyStep& a) {
  parallel_for_ranges(a.rows, std::max<int64_t>(kPerTask / std::max<int64_t>(a.size, 1), 1),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t row = begin; row < end; ++row) cross_entropy_row<T>(a, row);
                      });
}

// d silu(x) / dx = s + silu(x) (1 - s), of s = 1 / (1 + exp(-x)).
template <typename T>
void gated_silu_as(const GatedSilu& a) {
  const auto gate = static_cast<const T*>(a.gate), up = static_cast<const T*>(a.up);
  const auto out_grad = static_cast<const T*>(a.out_grad);
  const auto out = static_cast<T*>(a.out), gate_grad = static_cast<T*>(a.gate_grad);
  const auto up_grad = static_cast<T*>(a.up_grad);
  parallel_for_ranges(a.count, kPerTask, [&](int64_t begin, int64_t end) {
    if (out_grad == nullptr) {
      silu_and_mul_row(gate + begin, up + begin, out + begin, end - begin);
      return;
    }
    for_each_vec(end - begin, [&](int64_t i, int64_t count) {
      const int64_t at = begin + i;
      const Vec x = load_some(gate + at, count), grad = load_some(out_grad + at, count);
      const Vec sigmoid = 1.0f / (1.0f + exp(-x)), silu = x * sigmoid;
      store_some(up_grad + at, grad * rounded<T>(silu), count);
      store_some(gate_grad + at, grad * load_some(up + at, count) * (sigmoid + silu * (1.0f - sigmoid)), count);
    });
  });
}

template <typename X, typename Out>
void norm_row(const TrainingNorm& a, int64_t row) {
  const int64_t at = row * a.size;
  const X* x = static_cast<const X*>(a.x) + at;
  const float* residual = a.residual != nullptr ? a.residual + at : nullptr;
  float* total = a.total + at;
  Out* out = static_cast<Out*>(a.out) + at;
  Vec squares{};
  for_each_vec(a.size, [&](int64_t i, int64_t count) {
    Vec value = load_some(x + i, count);
    if (residual != nullptr) value += load_some(residual + i, count);
    store_some(total + i, value, count);
    squares += value * value;
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(a.size) + a.eps);
  a.inverse_rms[row] = scale;
  for_each_vec(a.size, [&](int64_t i, int64_t count) {
    store_some(out + i, load_some(total + i, count) * scale * load_some(a.weight + i, count), count);
  });
}

template <typename X, typename Out>
void norm_as(const TrainingNorm& a) {
  parallel_for_ranges(a.rows, std::max<int64_t>(kPerTask / std::max<int64_t>(a.size, 1), 1),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t row = begin; row < end; ++row) norm_row<X, Out>(a, row);
                      });
}

// With y = w x r and r = (mean(x^2) + eps)^(-1/2): dx = r (w dy - x r^2 mean(w dy x)), dw = dy x r.
template <typename Out>
void norm_backward_row(const TrainingNormBackward& a, int64_t row, float* weight_grad) {
  const int64_t at = row * a.size;
  const Out* out_grad = static_cast<const Out*>(a.out_grad) + at;
  const float* x = a.total + at;
  const float* past = a.total_grad != nullptr ? a.total_grad + at : nullptr;
  Bf16* x_grad = a.x_grad != nullptr ? static_cast<Bf16*>(a.x_grad) + at : nullptr;
  const float scale = a.inverse_rms[row];
  Vec products{};
  for_each_vec(a.size, [&](int64_t i, int64_t count) {
    const Vec grad = load_some(out_grad + i, count), value = load_some(x + i, count);
    products += grad * load_some(a.weight + i, count) * value;
    store_some(weight_grad + i, load_some(weight_grad + i, count) + grad * value * scale, count);
  });
  const float shift = sum(products) / static_cast<float>(a.size) * scale * scale;
  for_each_vec(a.size, [&](int64_t i, int64_t count) {
    const Vec grad = load_some(out_grad + i, count) * load_some(a.weight + i, count);
    Vec result = (grad - load_some(x + i, count) * shift) * scale;
    if (past != nullptr) result += load_some(past + i, count);
    store_some(a.residual_grad + at + i, result, count);
    if (x_grad != nullptr) store_some(x_grad + i, result, count);
  });
}

template <typename Out>
void norm_backward_as(const TrainingNormBackward& a) {
  parallel_for(norm_parts(a.rows), [&](int64_t part) {
    float* weight_grad = a.weight_parts + part * a.size;
    std::fill_n(weight_grad, a.size, 0.0f);
    const int64_t end = std::min((part + 1) * kRowsPerPart, a.rows);
    for (int64_t row = part * kRowsPerPart; row < end; ++row) norm_backward_row<Out>(a, row, weight_grad);
  });
}

}  // namespace

void cross_entropy_step(const CrossEntropyStep& args) {
  args.is_bf16 ? cross_entropy_as<Bf16>(args) : cross_entropy_as<float>(args);
}

void gated_silu(const GatedSilu& args) { args.is_bf16 ? gated_silu_as<Bf16>(args) : gated_silu_as<float>(args); }

void training_norm(const TrainingNorm& args) {
  if (args.is_x_bf16)
    args.is_out_bf16 ? norm_as<Bf16, Bf16>(args) : norm_as<Bf16, float>(args);
  else
    args.is_out_bf16 ? norm_as<float, Bf16>(args) : norm_as<float, float>(args);
}

void training_norm_backward(const TrainingNormBackward& args) {
  args.is_out_bf16 ? norm_backward_as<Bf16>(args) : norm_backward_as<float>(args);
}

}  // namespace apt::APT_ISA
