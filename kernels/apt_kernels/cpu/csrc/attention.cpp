#include "attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>
#include <vector>

#include "pack_tile.h"
#include "scratch.h"
#include "thread_pool.h"
#include "tile_matmul.h"
#include "vec.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kTile = 64;    // keys whose scores are held at a time
constexpr int64_t kSplit = 256;  // keys with one online softmax: the unit of work of a decode
constexpr int64_t kTargetRows = 64;  // query rows (queries x heads of a group) that share a packed tile
constexpr float kNone = -std::numeric_limits<float>::infinity();

thread_local Scratch work_scratch;     // of the task a thread is in
thread_local Scratch partial_scratch;  // of the call a thread has made

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Some consecutive queries of one sequence, for every kv head: over all splits, or over one of several that are folded.
struct Item {
  int64_t seq;
  int64_t first_query, num_queries;  // within the sequence
  int64_t first_split, end_split;
  // Of an item that is one of several with the same queries; num_partials is 1 for any other.
  int64_t num_partials;
  int64_t first_partial, partial;  // where the first of them, and where this one, leaves its result
  int64_t counter;                 // of those that are done
};

// Weighted sums of values and their weights, not yet normalized: what folds.
struct State {
  float* sums;     // [rows, head_dim]
  float* weights;  // [rows]
  float* maxima;   // [rows], of the scores

  static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
  static State at(float* memory, int64_t rows, int64_t dim) {
    return {memory, memory + rows * dim, memory + rows * (dim + 1)};
  }
  void clear(int64_t rows, int64_t dim) const {
    std::fill_n(sums, rows * (dim + 1), 0.0f);
    std::fill_n(maxima, rows, kNone);
  }
};

inline float exp_one(float x) { return exp(broadcast(x))[0]; }

void scale_row(float* row, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) store(row + d, load(row + d) * factor);
}

// total = total folded with a later split.
void fold(const State& total, const State& split, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (split.maxima[r] == kNone) continue;
    const float highest = std::max(total.maxima[r], split.maxima[r]);
    const float old = exp_one(total.maxima[r] - highest), fresh = exp_one(split.maxima[r] - highest);
    float* sums = total.sums + r * dim;
    for (int64_t d = 0; d < dim; d += kLanes)
      store(sums + d, load(sums + d) * old + load(split.sums + r * dim + d) * fresh);
    total.weights[r] = total.weights[r] * old + split.weights[r] * fresh;
    total.maxima[r] = highest;
  }
}

// The work of one item for one kv head. T: storage of queries and cache.
template <typename T>
class HeadTask {
 public:
  using Words = std::conditional_t<std::is_same_v<T, float>, Float32Words, Bf16Words>;
  using Element = typename Words::Element;

  HeadTask(const PagedAttention& args, const Item& item, int64_t kv_head)
      : a_(args), item_(item), kv_head_(kv_head), group_(args.num_heads / args.num_kv_heads), dim_(args.head_dim) {
    rows_ = item.num_queries * group_;
    const int64_t queries_in_seq = args.cu_seqlens_q[item.seq + 1] - args.cu_seqlens_q[item.seq];
    first_position_ = args.context_lens[item.seq] - queries_in_seq + item.first_query;
    key_begin_ = args.window > first_position_ ? 0 : first_position_ - args.window + 1;
    key_end_ = first_position_ + item.num_queries;
    table_ = args.block_tables + item.seq * args.table_stride;
    lay_out();
  }

  int64_t rows() const { return rows_; }

  // Leaves the fold of the item's splits in `total`.
  void run(const State& total) {
    total.clear(rows_, dim_);
    pack_queries();
    prefetch(std::max(item_.first_split * kSplit, key_begin_ / kTile * kTile));
    for (int64_t split = item_.first_split; split < item_.end_split; ++split) {
      split_.clear(rows_, dim_);
      const int64_t end = std::min((split + 1) * kSplit, key_end_);
      for (int64_t tile = split * kSplit; tile < end; tile += kTile) {
        if (tile + kTile <= key_begin_) continue;
        if (tile + kTile < item_.end_split * kSplit) prefetch(tile + kTile);
        run_tile(tile, std::min(tile + kTile, end));
      }
      fold(total, split_, rows_, dim_);
    }
  }

  void write(const State& total) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const float inverse = 1.0f / total.weights[r];
      T* out = static_cast<T*>(a_.out) + row_offset(r);
      for (int64_t d = 0; d < dim_; d += kLanes) store(out + d, load(total.sums + r * dim_ + d) * inverse);
    }
  }

  State whole_state() const { return whole_; }

 private:
  void lay_out() {
    const int64_t state = divide_up(State::size(rows_, dim_), 16) * 16;
    const int64_t query_words = rows_ * dim_ / Words::kPerWord, weight_words = rows_ * kTile / Words::kPerWord;
    const int64_t packed_words = kTile * dim_ / Words::kPerWord;
    auto* next = static_cast<float*>(
        work_scratch.get(4 * (2 * state + query_words + weight_words + 2 * packed_words + rows_ * kTile)));
    const auto take = [&next](int64_t words) { return std::exchange(next, next + words); };
    packed_keys_ = reinterpret_cast<uint32_t*>(take(packed_words));
    packed_values_ = reinterpret_cast<uint32_t*>(take(packed_words));
    scores_ = take(rows_ * kTile);
    query_ = reinterpret_cast<Element*>(take(query_words));
    weights_ = reinterpret_cast<Element*>(take(weight_words));
    split_ = State::at(take(state), rows_, dim_);
    whole_ = State::at(take(state), rows_, dim_);
  }

  // Rows are queries x heads of the group.
  int64_t row_offset(int64_t row) const {
    const int64_t token = a_.cu_seqlens_q[item_.seq] + item_.first_query + row / group_;
    return (token * a_.num_heads + kv_head_ * group_ + row % group_) * dim_;
  }

  void pack_queries() {
    for (int64_t r = 0; r < rows_; ++r)
      copy_as(static_cast<const T*>(a_.query) + row_offset(r), query_ + r * dim_, dim_);
  }

  // Calls f(key, offset in the caches) for keys begin .. end - 1; no other place of the caches is ever read.
  template <typename F>
  void for_each_key(int64_t begin, int64_t end, F f) const {
    int64_t block = begin / a_.block_size, slot = begin % a_.block_size;
    for (int64_t key = begin; key < end; ++block, slot = 0) {
      int64_t at = table_[block] * a_.block_stride + slot * a_.slot_stride + kv_head_ * a_.head_stride;
      for (; slot < a_.block_size && key < end; ++slot, ++key, at += a_.slot_stride) f(key, at);
    }
  }

  // A head's rows lie far apart, in blocks that lie anywhere: no processor foresees that by itself.
  void prefetch(int64_t tile) const {
    const auto keys = static_cast<const T*>(a_.key_cache), values = static_cast<const T*>(a_.value_cache);
    const int64_t end = std::min(tile + kTile, key_end_);
    for_each_key(std::max(tile, key_begin_), end, [&](int64_t, int64_t at) { prefetch_row(keys + at); });
    for_each_key(std::max(tile, key_begin_), end, [&](int64_t, int64_t at) { prefetch_row(values + at); });
  }

  void prefetch_row(const T* row) const {
    const auto bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < dim_ * int64_t{sizeof(T)}; i += 64) prefetch_line(bytes + i);
  }

  // Notes where the keys of a tile are, by key - tile; places without a key count as zeros.
  void find_keys(int64_t tile, int64_t begin, int64_t end) {
    const auto keys = static_cast<const T*>(a_.key_cache), values = static_cast<const T*>(a_.value_cache);
    std::fill_n(key_rows_, kTile, nullptr);
    std::fill_n(value_rows_, kTile, nullptr);
    for_each_key(begin, end, [&](int64_t key, int64_t at) {
      key_rows_[key - tile] = keys + at;
      value_rows_[key - tile] = values + at;
    });
  }

  void run_tile(int64_t tile, int64_t end) {
    const int64_t count = end - tile, columns = divide_up(count, 16) * 16;
    find_keys(tile, std::max(tile, key_begin_), end);
    pack_keys<Words>(key_rows_, columns, dim_, packed_keys_, kTile);
    pack_values<Words>(value_rows_, count, dim_, packed_values_);
    multiply<Words>({reinterpret_cast<const uint32_t*>(query_), dim_ / Words::kPerWord, packed_keys_, kTile, scores_,
                     kTile, rows_, columns, dim_ / Words::kPerWord, false});
    const bool sees_all = end <= first_position_ + 1 && key_end_ - 1 - tile < a_.window && count == kTile;
    for (int64_t r = 0; r < rows_; ++r) sees_all ? weigh_row<false>(r, tile, end) : weigh_row<true>(r, tile, end);
    multiply<Words>({reinterpret_cast<const uint32_t*>(weights_), kTile / Words::kPerWord, packed_values_, dim_,
                     split_.sums, dim_, rows_, dim_, divide_up(count, Words::kPerWord), true});
  }

  // Scores of a row -> weights relative to the row's highest score so far.
  template <bool kIsMasked>
  void weigh_row(int64_t r, int64_t tile, int64_t end) {
    float* scores = scores_ + r * kTile;
    Element* weights = weights_ + r * kTile;
    if (kIsMasked) mask_row(scores, first_position_ + r / group_, tile, end);
    Vec highest_lanes = load(scores);
    for (int64_t i = kLanes; i < kTile; i += kLanes) highest_lanes = max(highest_lanes, load(scores + i));
    const float here = max(highest_lanes) * a_.scale;
    const float highest = std::max(split_.maxima[r], here);
    if (highest == kNone) {
      std::fill_n(weights, kTile, Element{});
      return;
    }
    if (highest > split_.maxima[r]) {
      const float factor = exp_one(split_.maxima[r] - highest);
      scale_row(split_.sums + r * dim_, factor, dim_);
      split_.weights[r] *= factor;
      split_.maxima[r] = highest;
    }
    Vec sums{};
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const Vec weight = exp(load(scores + i) * a_.scale - highest);
      sums += weight;
      store(weights + i, weight);
    }
    split_.weights[r] += sum(sums);
  }

  void mask_row(float* scores, int64_t position, int64_t tile, int64_t end) const {
    const int64_t seen_end = std::min(end, position + 1) - tile;
    const int64_t seen_begin = a_.window > position ? 0 : position + 1 - a_.window - tile;
    for (int64_t i = 0; i < kTile; ++i) scores[i] = i >= seen_begin && i < seen_end ? scores[i] : kNone;
  }

  const PagedAttention& a_;
  const Item& item_;
  const int64_t kv_head_, group_, dim_;
  int64_t rows_, first_position_, key_begin_, key_end_;
  const int32_t* table_;
  const T* key_rows_[kTile];
  const T* value_rows_[kTile];
  uint32_t* packed_keys_;    // [head_dim words, kTile]
  uint32_t* packed_values_;  // [kTile words, head_dim]
  float* scores_;            // [rows, kTile]
  Element* query_;           // [rows, head_dim]
  Element* weights_;         // [rows, kTile]
  State split_, whole_;
};

struct Plan {
  std::vector<Item> items;
  int64_t num_partials = 0, num_counters = 0;
};

void plan_sequence(const PagedAttention& a, int64_t seq, int64_t queries_per_item, Plan& plan) {
  const int64_t num_queries = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq];
  const int64_t num_items = divide_up(num_queries, queries_per_item);
  for (int64_t i = num_items - 1; i >= 0; --i) {  // the last see the most keys: longest first
    const int64_t first = i * queries_per_item, count = std::min(queries_per_item, num_queries - first);
    const int64_t position = a.context_lens[seq] - num_queries + first;
    const int64_t first_split = a.window > position ? 0 : (position - a.window + 1) / kSplit;
    const int64_t end_split = divide_up(position + count, kSplit);
    const int64_t num_splits = end_split - first_split;
    if (num_items > 1 || num_splits == 1) {
      plan.items.push_back({seq, first, count, first_split, end_split, 1, 0, 0, 0});
      continue;
    }
    const int64_t first_partial = plan.num_partials;
    for (int64_t split = first_split; split < end_split; ++split)
      plan.items.push_back({seq, first, count, split, split + 1, num_splits, first_partial, plan.num_partials++,
                            plan.num_counters});
    ++plan.num_counters;
  }
}

template <typename T>
void paged_attention_as(const PagedAttention& a) {
  const int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim;
  const int64_t queries_per_item = std::max<int64_t>(kTargetRows / group, 1);
  Plan plan;
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) plan_sequence(a, seq, queries_per_item, plan);

  const int64_t partial_size = divide_up(State::size(queries_per_item * group, dim), 16) * 16;
  auto* partials = static_cast<float*>(partial_scratch.get(4 * plan.num_partials * a.num_kv_heads * partial_size));
  std::vector<std::atomic<int64_t>> num_done(static_cast<size_t>(plan.num_counters * a.num_kv_heads));

  parallel_for(static_cast<int64_t>(plan.items.size()) * a.num_kv_heads, [&](int64_t task) {
    const Item& item = plan.items[static_cast<size_t>(task / a.num_kv_heads)];
    const int64_t kv_head = task % a.num_kv_heads;
    HeadTask<T> work(a, item, kv_head);
    const State whole = work.whole_state();
    if (item.num_partials == 1) {
      work.run(whole);
      work.write(whole);
      return;
    }
    const auto partial = [&](int64_t index) {
      return State::at(partials + (index * a.num_kv_heads + kv_head) * partial_size, work.rows(), dim);
    };
    work.run(partial(item.partial));
    auto& done = num_done[static_cast<size_t>(item.counter * a.num_kv_heads + kv_head)];
    if (done.fetch_add(1) + 1 < item.num_partials) return;
    whole.clear(work.rows(), dim);  // the last to finish folds them all, in order
    for (int64_t i = 0; i < item.num_partials; ++i) fold(whole, partial(item.first_partial + i), work.rows(), dim);
    work.write(whole);
  });
}

}  // namespace

void paged_attention(const PagedAttention& args) {
  args.is_bf16 ? paged_attention_as<Bf16>(args) : paged_attention_as<float>(args);
}

}  // namespace apt::APT_ISA
