// All layers of a decoder in one call. At batch 1 a step is a few milliseconds, and hundreds of calls from Python would
// take one or two of them.
//
// Nothing is computed here: the kernels of the single ops run one after another over a few buffers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "elementwise.h"
#include "linear.h"

namespace {

using at::Tensor;
using namespace apt::checks;
using OptionalTensor = std::optional<Tensor>;

// data; format "bf16", "int8" or "int4"; scales (int8); bias, float32; out; in; group size (int4)
using PackedWeight = std::tuple<Tensor, std::string, OptionalTensor, OptionalTensor, int64_t, int64_t, int64_t>;

class Product {
 public:
  explicit Product(const PackedWeight& weight) {
    std::string format;
    std::tie(data_, format, scales_, bias_, out_, in_, group_size_) = weight;
    TORCH_CHECK(format == "bf16" || format == "int8" || format == "int4", "format: unknown ", format);
    format_ = format == "bf16" ? Format::bf16 : format == "int8" ? Format::int8 : Format::int4;
    TORCH_CHECK(data_.is_contiguous() && data_.scalar_type() == at::kByte && data_.numel() == num_bytes(),
                "data: does not fit out and in");
    if (format_ == Format::int8) check_floats(scales_.value(), "scales");
    if (bias_) check_floats(*bias_, "bias");
  }

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }

  // x [rows, in] -> y [rows, out], and [rows, out / 2] gated if it is not null; all bf16.
  void operator()(const void* x, void* y, int64_t rows, void* gated = nullptr) const {
    apt::Linear args{};
    args.x = x;
    args.packed = data_.const_data_ptr<uint8_t>();
    args.out = y;
    args.bias = bias_ ? bias_->const_data_ptr<float>() : nullptr;
    args.scales = scales_ ? scales_->const_data_ptr<float>() : nullptr;
    args.rows = rows;
    args.in = in_;
    args.out_features = out_;
    args.group_size = group_size_;
    args.is_x_bf16 = args.is_out_bf16 = true;
    args.gated = gated;
    switch (format_) {
      case Format::bf16: APT_DISPATCH(bf16_linear, args); break;
      case Format::int8: APT_DISPATCH(int8_linear, args); break;
      case Format::int4: APT_DISPATCH(int4_linear, args); break;
    }
  }

 private:
  enum class Format { bf16, int8, int4 };

  int64_t num_bytes() const {
    switch (format_) {
      case Format::bf16: return apt::bf16_packed_bytes(out_, in_);
      case Format::int8: return apt::int8_packed_bytes(out_, in_);
      case Format::int4: break;
    }
    TORCH_CHECK(group_size_ > 0 && in_ % group_size_ == 0, "group_size: must divide in");
    return apt::int4_packed_bytes(out_, in_, group_size_);
  }

  void check_floats(const Tensor& x, const char* name) const {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() == out_, name, ": float32 [out]");
  }

  Tensor data_;
  OptionalTensor scales_, bias_;
  Format format_;
  int64_t out_, in_, group_size_;
};

struct Layer {
  Tensor input_norm, post_attention_norm;
  OptionalTensor query_norm, key_norm;
  Product qkv, attention_out, gate_up, down;
  int64_t window;
};

class DecoderLayers : public torch::CustomClassHolder {
 public:
  DecoderLayers(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double eps, double scale, Tensor final_norm)
      : num_heads_(num_heads),
        num_kv_heads_(num_kv_heads),
        head_dim_(head_dim),
        eps_(static_cast<float>(eps)),
        scale_(static_cast<float>(scale)),
        final_norm_(std::move(final_norm)) {
    TORCH_CHECK(num_heads % num_kv_heads == 0, "num_kv_heads: must divide num_heads");
    TORCH_CHECK(head_dim % 16 == 0, "head_dim: a multiple of 16");
  }

  void add(const Tensor& input_norm, const PackedWeight& qkv, const OptionalTensor& query_norm,
           const OptionalTensor& key_norm, const PackedWeight& attention_out, const Tensor& post_attention_norm,
           const PackedWeight& gate_up, const PackedWeight& down, std::optional<int64_t> window) {
    Layer layer{input_norm,       post_attention_norm,    query_norm,       key_norm,      Product(qkv),
                Product(attention_out), Product(gate_up), Product(down),
                window.value_or(std::numeric_limits<int64_t>::max())};
    const int64_t hidden = final_norm_.numel(), attention = num_heads_ * head_dim_;
    for (const Tensor& norm : {input_norm, post_attention_norm}) check_norm(norm, hidden);
    for (const OptionalTensor& norm : {query_norm, key_norm}) {
      if (norm) check_norm(*norm, head_dim_);
    }
    TORCH_CHECK(layer.qkv.in() == hidden && layer.qkv.out() == attention + 2 * num_kv_heads_ * head_dim_, "qkv");
    TORCH_CHECK(layer.attention_out.in() == attention && layer.attention_out.out() == hidden, "attention_out");
    TORCH_CHECK(layer.gate_up.in() == hidden && layer.gate_up.out() == 2 * layer.down.in(), "gate_up");
    TORCH_CHECK(layer.down.out() == hidden, "down");
    layers_.push_back(std::move(layer));
  }

  // Embedded tokens [T, C] -> normed hidden states [T, C]; keys and values are stored in the caches.
  Tensor forward(const Tensor& x, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& key_caches,
                 const std::vector<Tensor>& value_caches, const std::vector<OptionalTensor>& key_scales,
                 const std::vector<OptionalTensor>& value_scales, const Tensor& slot_mapping, const Tensor& cu_seqlens_q,
                 const Tensor& context_lens, const Tensor& block_tables) const {
    TORCH_CHECK(key_caches.size() == layers_.size() && value_caches.size() == layers_.size() &&
                    key_scales.size() == layers_.size() && value_scales.size() == layers_.size(),
                "caches: one per layer");
    check_norm(final_norm_, x.size(1));
    Pass pass(*this, x, slot_mapping, context_lens, block_tables);
    pass.set_rope(cos, sin);
    for (size_t i = 0; i < layers_.size(); ++i) {
      pass.set_cache({key_caches[i], value_caches[i], key_scales[i], value_scales[i]},
                     i == 0 ? &cu_seqlens_q : nullptr);
      pass.run(layers_[i]);
    }
    return pass.finish(final_norm_);
  }

 private:
  static void check_norm(const Tensor& weight, int64_t size) {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.numel() == size,
                "norm weight: contiguous bfloat16 of its layer's size");
  }

  // One forward pass: its buffers, and the arguments that stay the same from layer to layer.
  class Pass {
   public:
    Pass(const DecoderLayers& model, const Tensor& x, const Tensor& slot_mapping, const Tensor& context_lens,
         const Tensor& block_tables)
        : model_(model), rows_(x.size(0)), x_(x.contiguous()), slots_(slot_mapping.contiguous()),
          tables_(block_tables.contiguous()) {
      TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kBFloat16, "x: bfloat16 [T, C]");
      TORCH_CHECK(slots_.scalar_type() == at::kLong && slots_.numel() == rows_, "slot_mapping: int64 [T]");
      const int64_t hidden = x.size(1), attention = model.num_heads_ * model.head_dim_;
      int64_t widest = attention + 2 * model.num_kv_heads_ * model.head_dim_, inner = 0;
      for (const Layer& layer : model.layers_) {
        widest = std::max(widest, layer.gate_up.out());
        inner = std::max(inner, layer.down.in());
      }
      normed_ = empty(hidden);
      residual_ = empty(hidden);
      out_ = empty(hidden);
      wide_ = empty(widest);
      query_ = empty(attention);
      attended_ = empty(attention);
      inner_ = empty(inner);

      attention_.query = query_.const_data_ptr();
      attention_.out = attended_.mutable_data_ptr();
      attention_.context_lens = int32_data(context_lens, "context_lens");
      attention_.block_tables = int32_data(tables_, "block_tables");
      attention_.num_seqs = context_lens.size(0);
      TORCH_CHECK(tables_.size(0) == attention_.num_seqs, "block_tables: one row per sequence");
      attention_.table_stride = tables_.size(1);
      attention_.num_heads = rope_.num_heads = model.num_heads_;
      attention_.num_kv_heads = rope_.num_kv_heads = model.num_kv_heads_;
      attention_.head_dim = rope_.head_dim = model.head_dim_;
      attention_.scale = model.scale_;
      attention_.is_bf16 = rope_.is_bf16 = true;

      rope_.qkv = wide_.const_data_ptr();
      rope_.query = query_.mutable_data_ptr();
      rope_.slots = slots_.const_data_ptr<int64_t>();
      rope_.num_tokens = rows_;
      rope_.eps = model.eps_;
    }

    void set_rope(const Tensor& cos, const Tensor& sin) {
      cos_ = operand(cos, x_, rows_ * model_.head_dim_ / 2, "cos");
      sin_ = operand(sin, x_, rows_ * model_.head_dim_ / 2, "sin");
      rope_.cos = cos_.const_data_ptr();
      rope_.sin = sin_.const_data_ptr();
    }

    // The layout is checked once, against the first layer's cache: all must have its shape.
    void set_cache(const KVCache& cache, const Tensor* cu_seqlens_q) {
      const Tensor& keys = cache.keys;
      check_cache(cache, x_);
      TORCH_CHECK(keys.size(2) == model_.num_kv_heads_ && keys.size(3) == model_.head_dim_, "caches: [N, P, K, D]");
      if (cu_seqlens_q != nullptr) {
        num_blocks_ = keys.size(0);
        attention_.block_size = rope_.block_size = keys.size(1);
        attention_.cu_seqlens_q = int32_data(*cu_seqlens_q, "cu_seqlens_q");
        TORCH_CHECK(cu_seqlens_q->size(0) == attention_.num_seqs + 1, "cu_seqlens_q: [B + 1]");
        check_layout(attention_, rows_, num_blocks_);
        check_slots(rope_.slots, rows_, num_blocks_ * rope_.block_size);
      }
      TORCH_CHECK(keys.size(0) == num_blocks_ && keys.size(1) == rope_.block_size, "caches: all of one shape");
      apt::checks::set_cache(rope_, cache);
      apt::checks::set_cache(attention_, cache);
    }

    void run(const Layer& layer) {
      add_norm(layer.input_norm);
      layer.qkv(normed_.const_data_ptr(), wide_.mutable_data_ptr(), rows_);
      rope_.query_weight = layer.query_norm ? layer.query_norm->const_data_ptr() : nullptr;
      rope_.key_weight = layer.key_norm ? layer.key_norm->const_data_ptr() : nullptr;
      APT_DISPATCH(rope_and_store_kv, rope_);
      attention_.window = layer.window;
      APT_DISPATCH(paged_attention, attention_);
      layer.attention_out(attended_.const_data_ptr(), out_.mutable_data_ptr(), rows_);
      add_norm(layer.post_attention_norm);
      if (apt::can_gate(layer.gate_up.out())) {
        layer.gate_up(normed_.const_data_ptr(), wide_.mutable_data_ptr(), rows_, inner_.mutable_data_ptr());
      } else {
        layer.gate_up(normed_.const_data_ptr(), wide_.mutable_data_ptr(), rows_);
        const apt::SiluAndMul gate{wide_.const_data_ptr(), inner_.mutable_data_ptr(), rows_, layer.down.in(), true};
        APT_DISPATCH(silu_and_mul, gate);
      }
      layer.down(inner_.const_data_ptr(), out_.mutable_data_ptr(), rows_);
    }

    Tensor finish(const Tensor& final_norm) {
      add_norm(final_norm);
      return normed_;
    }

   private:
    Tensor empty(int64_t size) const { return at::empty({rows_, size}, x_.options()); }

    // Adds what the layer so far gave to the residual stream, and norms it. The stream begins with the embeddings.
    void add_norm(const Tensor& weight) {
      const bool is_first = !has_residual_;
      apt::RmsNorm args{};
      args.x = is_first ? x_.const_data_ptr() : out_.const_data_ptr();
      args.residual = is_first ? nullptr : stream_->const_data_ptr();
      args.weight = weight.const_data_ptr();
      args.sum = is_first ? nullptr : residual_.mutable_data_ptr();
      args.out = normed_.mutable_data_ptr();
      args.rows = rows_;
      args.size = weight.numel();
      args.eps = model_.eps_;
      args.is_bf16 = true;
      APT_DISPATCH(rms_norm, args);
      stream_ = is_first ? &x_ : &residual_;
      has_residual_ = true;
    }

    const DecoderLayers& model_;
    const int64_t rows_;
    Tensor x_, slots_, tables_, cos_, sin_;
    Tensor normed_, residual_, out_, wide_, query_, attended_, inner_;
    const Tensor* stream_ = nullptr;
    bool has_residual_ = false;
    int64_t num_blocks_ = 0;
    apt::RopeAndStore rope_{};
    apt::PagedAttention attention_{};
  };

  const int64_t num_heads_, num_kv_heads_, head_dim_;
  const float eps_, scale_;
  const Tensor final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(apt_cpu, m) {
  m.class_<DecoderLayers>("DecoderLayers")
      .def(torch::init<int64_t, int64_t, int64_t, double, double, Tensor>())
      .def("add", &DecoderLayers::add)
      .def("forward", &DecoderLayers::forward);
}
