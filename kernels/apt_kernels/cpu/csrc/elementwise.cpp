#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "int8_group.h"
#include "silu.h"
#include "thread_pool.h"
#include "vec.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kMinPerTask = 8192;  // elements; below, waking a thread costs more than it saves

int64_t rows_per_task(int64_t row_size) { return std::max<int64_t>(kMinPerTask / std::max<int64_t>(row_size, 1), 1); }

template <typename T>
float inverse_rms(const T* x, int64_t size, float eps) {
  Vec squares{};
  for_each_vec(size, [&](int64_t i, int64_t count) {
    const Vec value = load_some(x + i, count);
    squares += value * value;
  });
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
}

template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
  const float scale = inverse_rms(x, size, eps);
  for_each_vec(size, [&](int64_t i, int64_t count) {
    const Vec scaled = rounded<T>(load_some(x + i, count) * scale);
    store_some(out + i, scaled * load_some(weight + i, count), count);
  });
}

template <typename T>
void add_row(const T* x, const T* residual, T* out, int64_t size) {
  for_each_vec(size, [&](int64_t i, int64_t count) {
    store_some(out + i, load_some(x + i, count) + load_some(residual + i, count), count);
  });
}

template <typename T>
void rms_norm_as(const RmsNorm& a) {
  const auto x = static_cast<const T*>(a.x), residual = static_cast<const T*>(a.residual);
  const auto total = static_cast<T*>(a.sum), out = static_cast<T*>(a.out);
  parallel_for_ranges(a.rows, rows_per_task(a.size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * a.size;
      if (residual != nullptr) add_row(x + at, residual + at, total + at, a.size);
      const T* from = residual != nullptr ? total : x;
      norm_row(from + at, static_cast<const T*>(a.weight), out + at, a.size, a.eps);
    }
  });
}

template <typename T>
void silu_and_mul_as(const SiluAndMul& a) {
  const auto gate_up = static_cast<const T*>(a.gate_up);
  const auto out = static_cast<T*>(a.out);
  parallel_for_ranges(a.rows, rows_per_task(4 * a.size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = gate_up + 2 * row * a.size;
      silu_and_mul_row(gate, gate + a.size, out + row * a.size, a.size);
    }
  });
}

// Halves are paired as in Hugging Face checkpoints: element i with element i + head_dim / 2.
template <typename T>
void rotate_head(const T* x, const T* cos, const T* sin, T* out, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for_each_vec(half, [&](int64_t i, int64_t count) {
    const Vec first = load_some(x + i, count), second = load_some(x + half + i, count);
    const Vec c = load_some(cos + i, count), s = load_some(sin + i, count);
    store_some(out + i, rounded<T>(first * c) - rounded<T>(second * s), count);
    store_some(out + half + i, rounded<T>(second * c) + rounded<T>(first * s), count);
  });
}

constexpr int64_t kMaxHeadDim = 1024;  // checked by the binding

template <typename T>
void norm_and_rotate_head(const T* x, const T* weight, float eps, const T* cos, const T* sin, T* out, int64_t head_dim) {
  T normed[kMaxHeadDim];
  if (weight != nullptr) {
    norm_row(x, weight, normed, head_dim, eps);
    x = normed;
  }
  rotate_head(x, cos, sin, out, head_dim);
}

// Where a token's keys and values go.
struct Places {
  int64_t row, scale;  // in the caches and in their scales, of the first head

  Places(const RopeAndStore& a, int64_t slot)
      : row(slot / a.block_size * a.block_stride + slot % a.block_size * a.slot_stride),
        scale(slot / a.block_size * a.scale_block_stride + slot % a.block_size * a.scale_slot_stride) {}
};

template <typename T>
void rope_and_store_token(const RopeAndStore& a, int64_t token) {
  const int64_t dim = a.head_dim;
  const T* head = static_cast<const T*>(a.qkv) + token * (a.num_heads + 2 * a.num_kv_heads) * dim;
  const T* cos = static_cast<const T*>(a.cos) + token * (dim / 2);
  const T* sin = static_cast<const T*>(a.sin) + token * (dim / 2);
  T* query = static_cast<T*>(a.query) + token * a.num_heads * dim;
  for (int64_t h = 0; h < a.num_heads; ++h, head += dim)
    norm_and_rotate_head(head, static_cast<const T*>(a.query_weight), a.eps, cos, sin, query + h * dim, dim);
  const int64_t slot = a.slots[token];
  if (slot < 0) return;
  const Places places(a, slot);
  const auto store_head = [&](const T* x, void* cache, float* scales, int64_t h) {
    const int64_t at = places.row + h * a.head_stride;
    if (scales == nullptr) {
      std::copy_n(x, dim, static_cast<T*>(cache) + at);
    } else {
      scales[places.scale + h * a.scale_head_stride] = quantize_group(x, dim, static_cast<int8_t*>(cache) + at).scale;
    }
  };
  for (int64_t h = 0; h < a.num_kv_heads; ++h, head += dim) {
    T key[kMaxHeadDim];
    norm_and_rotate_head(head, static_cast<const T*>(a.key_weight), a.eps, cos, sin, key, dim);
    store_head(key, a.key_cache, a.key_scales, h);
  }
  for (int64_t h = 0; h < a.num_kv_heads; ++h, head += dim) store_head(head, a.value_cache, a.value_scales, h);
}

template <typename T>
void rope_and_store_kv_as(const RopeAndStore& a) {
  const int64_t token_size = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
  parallel_for_ranges(a.num_tokens, rows_per_task(2 * token_size), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) rope_and_store_token<T>(a, token);
  });
}

}  // namespace

void rms_norm(const RmsNorm& args) { args.is_bf16 ? rms_norm_as<Bf16>(args) : rms_norm_as<float>(args); }

void silu_and_mul(const SiluAndMul& args) {
  args.is_bf16 ? silu_and_mul_as<Bf16>(args) : silu_and_mul_as<float>(args);
}

void rope_and_store_kv(const RopeAndStore& args) {
  args.is_bf16 ? rope_and_store_kv_as<Bf16>(args) : rope_and_store_kv_as<float>(args);
}

}  // namespace apt::APT_ISA
