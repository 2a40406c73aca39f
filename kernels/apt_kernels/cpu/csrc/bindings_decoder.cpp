// A decoder's step in one call, from the rows of running sequences to logits. At batch 1 a step is a few milliseconds, and
// hundreds of calls from Python would take one or two of them.
//
// Nothing is computed here: the kernels of the single ops run one after another over a few buffers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
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

  // x [rows, in] -> y [rows, out], and [rows, out / 2] gated if it is not null; all bf16, or y float32.
  void operator()(const void* x, void* y, int64_t rows, void* gated = nullptr, bool is_out_bf16 = true) const {
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
    args.is_x_bf16 = true;
    args.is_out_bf16 = is_out_bf16;
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
  DecoderLayers(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double eps, double scale, Tensor embedding,
                Tensor final_norm, Tensor cos, Tensor sin)
      : num_heads_(num_heads),
        num_kv_heads_(num_kv_heads),
        head_dim_(head_dim),
        eps_(static_cast<float>(eps)),
        scale_(static_cast<float>(scale)),
        embedding_(std::move(embedding)),
        final_norm_(std::move(final_norm)),
        cos_(std::move(cos)),
        sin_(std::move(sin)) {
    TORCH_CHECK(num_heads % num_kv_heads == 0, "num_kv_heads: must divide num_heads");
    TORCH_CHECK(head_dim % 16 == 0, "head_dim: a multiple of 16");
    check_table(embedding_, final_norm_.numel(), "embedding: bfloat16 [V, C]");
    check_table(cos_, head_dim / 2, "cos: bfloat16 [positions, D/2]");
    check_table(sin_, head_dim / 2, "sin: bfloat16 [positions, D/2]");
    TORCH_CHECK(cos_.size(0) == sin_.size(0), "sin: as many positions as cos");
    check_norm(final_norm_, embedding_.size(1));
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

  void set_head(const PackedWeight& weight) {
    head_.emplace(weight);
    TORCH_CHECK(head_->in() == final_norm_.numel(), "head");
  }

  void bind_caches(std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<OptionalTensor> key_scales,
                   std::vector<OptionalTensor> value_scales) {
    TORCH_CHECK(keys.size() == layers_.size() && values.size() == layers_.size() &&
                    key_scales.size() == layers_.size() && value_scales.size() == layers_.size() && !keys.empty(),
                "caches: one per layer");
    for (size_t i = 0; i < keys.size(); ++i) {
      check_cache({keys[i], values[i], key_scales[i], value_scales[i]}, embedding_);
      TORCH_CHECK(keys[i].sizes() == keys[0].sizes(), "caches: all of one shape");
      TORCH_CHECK(keys[i].size(2) == num_kv_heads_ && keys[i].size(3) == head_dim_, "caches: [N, P, K, D]");
    }
    keys_ = std::move(keys);
    values_ = std::move(values);
    key_scales_ = std::move(key_scales);
    value_scales_ = std::move(value_scales);
  }

  // Computes tokens starts[b] .. starts[b] + lengths[b] - 1 of the sequence in row slots[b] of token_ids [S, L], whose
  // blocks are in that row of block_tables [S, max_blocks]. Keys and values are stored in the caches.
  // Returns normed hidden states [T, C] and, if there is a head, logits [R, V] float32 after the last tokens of the
  // `sampled` ones of the sequences.
  std::tuple<Tensor, OptionalTensor> step(const Tensor& token_ids, const Tensor& block_tables,
                                          const std::vector<int64_t>& slots, const std::vector<int64_t>& starts,
                                          const std::vector<int64_t>& lengths,
                                          const std::vector<int64_t>& sampled) const {
    TORCH_CHECK(!keys_.empty(), "caches: none are bound");
    const Batch batch(*this, token_ids, block_tables, slots, starts, lengths);
    Pass pass(*this, batch);
    for (size_t i = 0; i < layers_.size(); ++i) pass.run(layers_[i], cache(i));
    const Tensor hidden = pass.finish(final_norm_);
    if (!head_) return {hidden, std::nullopt};
    return {hidden, logits(hidden, batch, sampled)};
  }

 private:
  static void check_norm(const Tensor& weight, int64_t size) {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && weight.numel() == size,
                "norm weight: contiguous bfloat16 of its layer's size");
  }

  static void check_table(const Tensor& table, int64_t width, const char* expected) {
    TORCH_CHECK(table.scalar_type() == at::kBFloat16 && table.is_contiguous() && table.dim() == 2 &&
                    table.size(1) == width,
                expected);
  }

  KVCache cache(size_t layer) const { return {keys_[layer], values_[layer], key_scales_[layer], value_scales_[layer]}; }

  // What a step computes, laid out token by token.
  struct Batch {
    Batch(const DecoderLayers& model, const Tensor& token_ids, const Tensor& block_tables,
          const std::vector<int64_t>& slots, const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths) {
      const int64_t block_size = model.keys_[0].size(1), num_seqs = static_cast<int64_t>(slots.size());
      TORCH_CHECK(starts.size() == slots.size() && lengths.size() == slots.size(), "starts, lengths: as many as slots");
      TORCH_CHECK(token_ids.scalar_type() == at::kLong && token_ids.dim() == 2 && token_ids.is_contiguous(),
                  "token_ids: contiguous int64 [S, L]");
      TORCH_CHECK(block_tables.scalar_type() == at::kInt && block_tables.dim() == 2 && block_tables.is_contiguous() &&
                      block_tables.size(0) == token_ids.size(0),
                  "block_tables: contiguous int32 [S, max_blocks]");
      const int64_t max_length = std::min({token_ids.size(1), model.cos_.size(0), block_tables.size(1) * block_size});
      int64_t longest = 0;
      bounds.push_back(0);
      for (size_t b = 0; b < slots.size(); ++b) {
        const int64_t end = starts[b] + lengths[b];
        TORCH_CHECK(slots[b] >= 0 && slots[b] < token_ids.size(0), "slots: ", slots[b], " is not a row");
        TORCH_CHECK(starts[b] >= 0 && lengths[b] > 0 && end <= max_length, "lengths: sequence ", b, " ends at ", end,
                    " of ", max_length);
        contexts.push_back(static_cast<int32_t>(end));
        bounds.push_back(bounds.back() + static_cast<int32_t>(lengths[b]));
        longest = std::max(longest, end);
      }
      table_width = (longest + block_size - 1) / block_size;
      tables.reserve(static_cast<size_t>(num_seqs * table_width));
      for (size_t b = 0; b < slots.size(); ++b) {
        const int32_t* blocks = block_tables.const_data_ptr<int32_t>() + slots[b] * block_tables.size(1);
        const int64_t* tokens = token_ids.const_data_ptr<int64_t>() + slots[b] * token_ids.size(1);
        tables.insert(tables.end(), blocks, blocks + table_width);
        for (int64_t position = starts[b]; position < starts[b] + lengths[b]; ++position) {
          TORCH_CHECK(tokens[position] >= 0 && tokens[position] < model.embedding_.size(0), "token_ids: ",
                      tokens[position], " is not in the vocabulary");
          ids.push_back(tokens[position]);
          positions.push_back(position);
          cache_slots.push_back(blocks[position / block_size] * block_size + position % block_size);
        }
      }
    }

    int64_t num_tokens() const { return static_cast<int64_t>(ids.size()); }

    std::vector<int64_t> ids, positions, cache_slots;  // by token
    std::vector<int32_t> contexts, tables;             // by sequence; tables [B, table_width]
    std::vector<int32_t> bounds;                       // of the sequences' tokens, [B + 1]
    int64_t table_width;
  };

  // [R, V] after the last tokens of these sequences.
  Tensor logits(const Tensor& hidden, const Batch& batch, const std::vector<int64_t>& sampled) const {
    const int64_t rows = static_cast<int64_t>(sampled.size());
    Tensor out = at::empty({rows, head_->out()}, hidden.options().dtype(at::kFloat));
    if (rows == 0) return out;
    std::vector<int64_t> last;
    for (const int64_t b : sampled) {
      TORCH_CHECK(b >= 0 && b < static_cast<int64_t>(batch.contexts.size()), "sampled: ", b, " is no sequence");
      last.push_back(batch.bounds[static_cast<size_t>(b) + 1] - 1);
    }
    Tensor chosen = hidden;
    if (rows < batch.num_tokens()) {
      chosen = at::empty({rows, hidden.size(1)}, hidden.options());
      gather(hidden, last, chosen);
    }
    (*head_)(chosen.const_data_ptr(), out.mutable_data_ptr(), rows, nullptr, false);
    return out;
  }

  // Rows of a table [.., width] by their numbers.
  static void gather(const Tensor& table, const std::vector<int64_t>& numbers, Tensor& out) {
    const auto row_bytes = static_cast<size_t>(table.size(1)) * table.element_size();
    const auto* from = static_cast<const uint8_t*>(table.const_data_ptr());
    auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
    for (const int64_t number : numbers) {
      std::memcpy(to, from + static_cast<size_t>(number) * row_bytes, row_bytes);
      to += row_bytes;
    }
  }

  // One forward pass: its buffers, and the arguments that stay the same from layer to layer.
  class Pass {
   public:
    Pass(const DecoderLayers& model, const Batch& batch) : model_(model), rows_(batch.num_tokens()) {
      const int64_t attention = model.num_heads_ * model.head_dim_, hidden = model.final_norm_.numel();
      int64_t widest = attention + 2 * model.num_kv_heads_ * model.head_dim_, inner = 0;
      for (const Layer& layer : model.layers_) {
        widest = std::max(widest, layer.gate_up.out());
        inner = std::max(inner, layer.down.in());
      }
      x_ = empty(hidden);
      normed_ = empty(hidden);
      residual_ = empty(hidden);
      out_ = empty(hidden);
      wide_ = empty(widest);
      query_ = empty(attention);
      attended_ = empty(attention);
      inner_ = empty(inner);
      cos_ = empty(model.head_dim_ / 2);
      sin_ = empty(model.head_dim_ / 2);
      gather(model.embedding_, batch.ids, x_);
      gather(model.cos_, batch.positions, cos_);
      gather(model.sin_, batch.positions, sin_);

      attention_.query = query_.const_data_ptr();
      attention_.out = attended_.mutable_data_ptr();
      attention_.cu_seqlens_q = batch.bounds.data();
      attention_.context_lens = batch.contexts.data();
      attention_.block_tables = batch.tables.data();
      attention_.table_stride = batch.table_width;
      attention_.num_seqs = static_cast<int64_t>(batch.contexts.size());
      attention_.num_heads = rope_.num_heads = model.num_heads_;
      attention_.num_kv_heads = rope_.num_kv_heads = model.num_kv_heads_;
      attention_.head_dim = rope_.head_dim = model.head_dim_;
      attention_.block_size = rope_.block_size = model.keys_[0].size(1);
      attention_.scale = model.scale_;
      attention_.is_bf16 = rope_.is_bf16 = true;
      check_layout(attention_, rows_, model.keys_[0].size(0));

      rope_.qkv = wide_.const_data_ptr();
      rope_.query = query_.mutable_data_ptr();
      rope_.cos = cos_.const_data_ptr();
      rope_.sin = sin_.const_data_ptr();
      rope_.slots = batch.cache_slots.data();
      rope_.num_tokens = rows_;
      rope_.eps = model.eps_;
    }

    void run(const Layer& layer, const KVCache& cache) {
      apt::checks::set_cache(rope_, cache);
      apt::checks::set_cache(attention_, cache);
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
    Tensor empty(int64_t size) const { return at::empty({rows_, size}, model_.embedding_.options()); }

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
    Tensor x_, cos_, sin_;
    Tensor normed_, residual_, out_, wide_, query_, attended_, inner_;
    const Tensor* stream_ = nullptr;
    bool has_residual_ = false;
    apt::RopeAndStore rope_{};
    apt::PagedAttention attention_{};
  };

  const int64_t num_heads_, num_kv_heads_, head_dim_;
  const float eps_, scale_;
  const Tensor embedding_, final_norm_, cos_, sin_;
  std::vector<Layer> layers_;
  std::optional<Product> head_;
  std::vector<Tensor> keys_, values_;  // by layer
  std::vector<OptionalTensor> key_scales_, value_scales_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(apt_cpu, m) {
  m.class_<DecoderLayers>("DecoderLayers")
      .def(torch::init<int64_t, int64_t, int64_t, double, double, Tensor, Tensor, Tensor, Tensor>())
      .def("add", &DecoderLayers::add)
      .def("bind_caches", &DecoderLayers::bind_caches)
      .def("set_head", &DecoderLayers::set_head)
      .def("step", &DecoderLayers::step);
}
